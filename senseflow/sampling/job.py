"""What one call is to draw: prompts, and the image and files of each; needs no torch."""

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from senseflow.common.environment import own_position
from senseflow.common.files import parse_json

logger = logging.getLogger(__name__)

PNG_BEGIN = b"\x89PNG\r\n\x1a\n"
PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"  # the last chunk of every whole PNG


@dataclass(frozen=True)
class Prompt:
    """One prompt and its number in the prompts file, which names its seed and file."""

    index: int
    text: str
    record: dict[str, Any] | None = None  # the whole entry of a file that says more than the text

    @property
    def id(self) -> Any:
        """What its file calls it, None when it says nothing."""
        return (self.record or {}).get("id")


@dataclass(frozen=True)
class Shot:
    """One image to draw: of which prompt, from which seed, to which files."""

    prompt: Prompt
    seed: int
    file: Path  # .png
    sidecar: Path  # .json: all that the image depends on


@dataclass(frozen=True)
class Output:
    """Where a call's images go, and which share of them is drawn here."""

    folder: Path
    overwrite: bool = False  # existing images are made again
    batch_size: int = 1
    shard: tuple[int, int] = (0, 1)  # (i, n): every n-th image from the i-th
    silent: bool = False  # no progress bar: another rank shows it


def prompt_shot(folder: Path, prompt: Prompt, seed: int) -> Shot:
    """The image of a prompt in a folder: `00007_a-red-fox.png`, number and words; seed + number."""
    words = re.sub(r"[\W_]+", "-", prompt.text.lower()).strip("-")[:50].strip("-")
    file = folder / f"{prompt.index:05d}_{words or 'image'}.png"
    # A seed per image: it is the same in any batch, shard or order.
    return Shot(prompt, seed + prompt.index, file, file.with_suffix(".json"))


def shard_of(text: str | None) -> tuple[int, int]:
    """(i, n) of --shard i/n, else of torchrun's environment, else (0, 1)."""
    if not text:
        position = own_position()
        return position.rank, position.world_size
    first, _, second = text.partition("/")
    if not (first.isdigit() and second.isdigit() and int(first) < int(second)):
        raise ValueError(f"--shard {text} is not I/N with 0 <= I < N")
    return int(first), int(second)


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


def read_sidecar(file: Path) -> dict[str, Any] | None:
    """How an image was made; None without a readable object."""
    try:
        found = parse_json(file.read_bytes(), "it")
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _changed(shot: Shot, settings: dict[str, Any], unknown: set[str]) -> str:
    """Which settings a sidecar has otherwise, in words; empty when all agree."""
    expected = {"prompt": shot.prompt.text, "seed": shot.seed, **settings}
    found = read_sidecar(shot.sidecar)
    if found is None:
        return "its .json is not there or not readable"
    differing = [k for k, v in expected.items() if k not in unknown and found.get(k) != v]
    # Of another family nearly all is different: its name says it.
    said = ["family"] if "family" in differing else differing[:2]
    return ", ".join(f"{k} {found.get(k)}, now {expected[k]}" for k in said)
