"""Pictures that go with a student: copied beside the card, with their prompts and seeds."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from senseflow.sampling.job import read_sidecar

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
        said = read_sidecar(file.with_suffix(".json")) or {}
        prompt, seed = said.get("prompt"), said.get("seed")
        prompt = prompt if isinstance(prompt, str) else None
        seed = seed if isinstance(seed, int) else None
        place = f"{FOLDER}/{number:02d}{file.suffix.lower()}"
        samples.append(Sample(file, place, prompt, seed))
    return samples


def _check(file: Path) -> None:
    try:
        with Image.open(file, formats=FORMATS) as picture:
            picture.load()
    except (OSError, SyntaxError) as error:
        raise ValueError(f"--samples {file} is not a picture: {error}") from error


def copy_samples(folder: Path, samples: list[Sample]) -> None:
    """Put the pictures where the card shows them."""
    for sample in samples:
        place = folder / sample.place
        place.parent.mkdir(exist_ok=True)
        shutil.copyfile(sample.file, place)
