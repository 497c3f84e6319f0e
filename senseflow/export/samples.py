"""Pictures that go with a student: copied beside the card, with their prompts and seeds."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

FOLDER = "samples"
FORMATS = ("PNG", "JPEG", "WEBP", "GIF")


@dataclass(frozen=True)
class Sample:
    """A picture and what its sidecar says of it."""

    file: Path
    place: str  # in the folder that is shipped
    prompt: str | None
    seed: int | None

    @property
    def alt(self) -> str:
        """What it shows, in one line without Markdown's brackets."""
        return " ".join((self.prompt or "a sample").replace("[", "(").replace("]", ")").split())


def read_samples(files: list[Path]) -> list[Sample]:
    """Raises ValueError for a file that is no whole picture."""
    samples = []
    for number, file in enumerate(files):
        _check(file)
        prompt, seed = _said(file.with_suffix(".json"))
        place = f"{FOLDER}/{number:02d}{file.suffix.lower()}"
        samples.append(Sample(file, place, prompt, seed))
    return samples


def _check(file: Path) -> None:
    try:
        with Image.open(file, formats=FORMATS) as picture:
            picture.load()
    except (OSError, SyntaxError) as error:
        raise ValueError(f"--samples {file} is not a picture: {error}") from error


def _said(sidecar: Path) -> tuple[str | None, int | None]:
    """Prompt and seed as the sampling scripts note them, None each without."""
    try:
        tree = json.loads(sidecar.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None, None
    if not isinstance(tree, dict):
        return None, None
    prompt, seed = tree.get("prompt"), tree.get("seed")
    return (
        prompt if isinstance(prompt, str) else None,
        seed if isinstance(seed, int) else None,
    )


def copy_samples(folder: Path, samples: list[Sample]) -> None:
    """Put the pictures where the card shows them."""
    for sample in samples:
        place = folder / sample.place
        place.parent.mkdir(exist_ok=True)
        shutil.copyfile(sample.file, place)
