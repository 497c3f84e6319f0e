"""Images as files: which are there already, and how they are written."""

import json
import logging
from pathlib import Path
from typing import Any

from PIL import Image

from senseflow.common.pictures import save_whole
from senseflow.sampling.job import Shot

logger = logging.getLogger(__name__)

PNG_BEGIN = b"\x89PNG\r\n\x1a\n"
PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"  # the last chunk of every whole PNG


def missing_shots(shots: list[Shot], settings: dict[str, Any], unknown: set[str]) -> list[Shot]:
    """The shots without a whole image.

    unknown: settings that need not agree. Raises ValueError when an image was made with others.
    """
    todo, damaged = [], []
    for shot in shots:
        if not shot.file.is_file():
            todo.append(shot)
        elif not is_whole(shot.file):
            todo.append(shot)
            damaged.append(shot)
        elif changed := _changed(shot, settings, unknown):
            raise ValueError(
                f"{shot.file} is there already, made with other settings ({changed}): choose "
                "another --output_dir, or --overwrite"
            )
    if damaged:
        first = damaged[0].file
        logger.warning("%d damaged images are made again, such as %s", len(damaged), first)
    return todo


def is_whole(file: Path) -> bool:
    """Whether a PNG has its beginning and its end, which one cut short by a crash has not."""
    with file.open("rb") as stream:
        begin = stream.read(len(PNG_BEGIN))
        size = stream.seek(0, 2)
        stream.seek(max(0, size - len(PNG_END)))
        return begin == PNG_BEGIN and stream.read() == PNG_END


def _changed(shot: Shot, settings: dict[str, Any], unknown: set[str]) -> str:
    """Which settings a sidecar has otherwise, in words; empty when all agree."""
    expected = {"prompt": shot.prompt.text, "seed": shot.seed, **settings}
    try:
        found = json.loads(shot.sidecar.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "its .json is not there or not readable"
    if not isinstance(found, dict):
        return "its .json holds no object"
    differing = [k for k, v in expected.items() if k not in unknown and found.get(k) != v]
    return ", ".join(f"{k} {found.get(k)}, now {expected[k]}" for k in differing[:4])


def write_shot(shot: Shot, image: Image.Image, settings: dict[str, Any]) -> None:
    """The sidecar, then the image: an image that is there is whole and described.

    An older image goes first, so that it never lies beside the new sidecar. Raises OSError naming
    the file, such as on a full disk.
    """
    sidecar = {"prompt": shot.prompt.text, "index": shot.prompt.index, "seed": shot.seed}
    if shot.prompt.id is not None:
        sidecar["id"] = shot.prompt.id
    text = json.dumps({**sidecar, **settings}, indent=2, ensure_ascii=False) + "\n"
    try:
        shot.sidecar.parent.mkdir(parents=True, exist_ok=True)
        shot.file.unlink(missing_ok=True)
        shot.sidecar.write_text(text, encoding="utf-8")
        save_whole(image, shot.file)
    except OSError as error:
        raise type(error)(
            f"writing {shot.file} failed: {error}. Finished images are kept: mend this, then run "
            "the same command again"
        ) from error
