"""Folders of images to measure: ours with sidecars, one per prompt and seed, or any others."""

import hashlib
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from senseflow.data.json_images import read_lists, to_rgb

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
SEED_FOLDER = re.compile(r"seed_(\d+)")
GRID = re.compile(r"grid(_\d+of\d+)?\.png")  # what sampling leaves beside its images
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


@dataclass(frozen=True)
class Picture:
    """An image file, its place among the prompts, and its prompt if that is known."""

    file: Path
    key: str  # which prompt: the index of our sidecars; for other folders the name or number
    prompt: str | None


@dataclass(frozen=True)
class ImageSet:
    """The images of a folder: `sets[s][p]` is the s-th seed's image of the p-th prompt."""

    folder: Path
    sets: list[list[Picture]]

    @property
    def pictures(self) -> list[Picture]:
        """All of them, seed after seed."""
        return [picture for one in self.sets for picture in one]

    @property
    def prompts(self) -> list[str | None]:
        """One per prompt, in order."""
        return [picture.prompt for picture in self.sets[0]]


def read_folder(folder: Path, prompts_file: Path | None = None) -> ImageSet:
    """The images of `folder`, or of its `seed_*` sub-folders, in the order of their prompts.

    prompts_file: .txt with a line per image, in the order of their names (numbers by value), or
    .json: {"file name": "prompt"}, or a data set's lists. It takes the place of the sidecars.

    Raises ValueError for a folder without images, an image without its sidecar where others have
    one, or seeds whose prompts differ.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder of images")
    seeds = [f for f in folder.iterdir() if f.is_dir() and SEED_FOLDER.fullmatch(f.name)]
    seeds.sort(key=lambda f: int(f.name.removeprefix("seed_")))
    sets = [_read_set(place, prompts_file) for place in seeds or [folder]]
    for place, one in zip(seeds[1:], sets[1:], strict=True):
        difference = _difference(sets[0], one)
        if difference:
            raise ValueError(f"{seeds[0]} and {place} are of different prompts: {difference}")
    return ImageSet(folder, sets)


def _difference(first: list[Picture], second: list[Picture]) -> str | None:
    """The first prompt that is not the same at the same place."""
    told = [{p.key: p.prompt for p in one} for one in (first, second)]
    for key in [*told[0], *told[1]]:
        if key not in told[0] or key not in told[1]:
            return f"prompt {key} is in {'the second' if key in told[1] else 'the first'} alone"
        if told[0][key] != told[1][key]:
            return f"prompt {key} is {told[0][key]!r} and {told[1][key]!r}"
    return None


def _read_set(folder: Path, prompts_file: Path | None) -> list[Picture]:
    files = [
        file
        for file in folder.iterdir()
        if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")
        if file.with_suffix(".json").exists() or not GRID.fullmatch(file.name)
    ]
    if not files:
        raise ValueError(f"{folder} holds no images ({', '.join(SUFFIXES)})")
    files.sort(key=_natural)
    if prompts_file is not None:
        return _with_prompts_of(files, prompts_file)
    if not any(file.with_suffix(".json").exists() for file in files):
        return [Picture(file, file.name, None) for file in files]
    return _with_sidecars(files)


def _natural(file: Path) -> list[tuple[int, str]]:
    """Names in order, runs of digits by their value."""
    parts = re.split(r"(\d+)", file.name)
    return [(int(part), part) if part.isdecimal() else (-1, part) for part in parts]


def _with_sidecars(files: list[Path]) -> list[Picture]:
    found: dict[int, Picture] = {}
    for file in files:
        sidecar = file.with_suffix(".json")
        try:
            told = json.loads(sidecar.read_text(encoding="utf-8"))
            index, prompt = int(told["index"]), str(told["prompt"])
        except FileNotFoundError as error:
            raise ValueError(
                f"{file} has no sidecar {sidecar.name}, where others have one: make it again, or "
                "say --prompts_file"
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{sidecar} is not a sidecar with prompt and index: {error!r}"
            ) from error
        if index in found:
            raise ValueError(
                f"{found[index].file} and {file} are both of prompt {index}: keep one image per "
                "prompt in a folder; several seeds lie in seed_0/, seed_1/, ..."
            )
        found[index] = Picture(file, f"{index:05d}", prompt)
    return [found[index] for index in sorted(found)]


def _with_prompts_of(files: list[Path], prompts_file: Path) -> list[Picture]:
    if prompts_file.suffix.lower() == ".json":
        by_name = _prompts_by_name(prompts_file)
        absent = [file for file in files if file.name not in by_name]
        if absent:
            raise ValueError(f"{prompts_file} has no prompt for {absent[0]}")
        return [Picture(file, file.name, by_name[file.name]) for file in files]
    try:
        lines = prompts_file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{prompts_file} is not UTF-8 text: {error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if len(prompts) != len(files):
        raise ValueError(
            f"{prompts_file} has {len(prompts)} prompts for the {len(files)} images of "
            f"{files[0].parent}"
        )
    return [
        Picture(file, f"{number:05d}", prompt)
        for number, (file, prompt) in enumerate(zip(files, prompts, strict=True))
    ]


def _prompts_by_name(file: Path) -> dict[str, str]:
    try:
        told: Any = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if isinstance(told, dict) and "image_paths" in told:
        _, paths, prompts = read_lists(file)
        return {Path(path).name: prompt for path, prompt in zip(paths, prompts, strict=True)}
    if not isinstance(told, dict) or not all(isinstance(p, str) for p in told.values()):
        raise ValueError(f'{file} is not of the form {{"file name": "prompt", ...}}')
    return told


def check_same_prompts(images: ImageSet, reference: ImageSet) -> bool:
    """Whether both folders say their prompts; raises ValueError where these differ.

    Compared is what was drawn, not its order: both must hold the same prompts.
    """
    pairs = ((images, reference), (reference, images))
    if None in images.prompts or None in reference.prompts:
        return False
    for one, other in pairs:
        held = set(other.prompts)
        for picture in one.sets[0]:
            if picture.prompt not in held:
                place = {p.key: p.prompt for p in other.sets[0]}.get(picture.key)
                raise ValueError(
                    f"{one.folder} and {other.folder} are of different prompts: {picture.key} is "
                    f"{picture.prompt!r} in the first and "
                    + (f"{place!r} in the second" if place is not None else "not in the second")
                )
    return True


def require_prompts(images: ImageSet) -> None:
    """Raise ValueError for a folder whose prompts are not known."""
    if None in images.prompts:
        raise ValueError(
            f"the prompts of {images.folder} are not known: its images have no sidecars; say "
            "--prompts_file"
        )


@dataclass(frozen=True)
class Inspected:
    """What a file holds, without decoding it."""

    sha256: str
    size: tuple[int, int]  # width, height


def inspect(picture: Picture) -> Inspected:
    """Hash and measure an image file; raises ValueError naming one that is damaged."""
    data = picture.file.read_bytes()
    try:
        with Image.open(io.BytesIO(data)) as opened:
            size = opened.size
            opened.verify()
    except UNREADABLE as error:
        raise ValueError(f"{picture.file} cannot be read as an image: {error}") from error
    return Inspected(hashlib.sha256(data).hexdigest(), size)


def open_rgb(file: Path) -> Image.Image:
    """An image file, decoded, upright, in RGB; raises ValueError naming it when it is damaged."""
    try:
        with Image.open(file) as opened:
            return to_rgb(opened)
    except UNREADABLE as error:
        raise ValueError(f"{file} cannot be read as an image: {error}") from error


def digest(pictures: Sequence[Picture], inspected: Sequence[Inspected]) -> str:
    """One hash of all images and their prompts; the folder's place does not matter."""
    told = [(p.key, p.prompt, i.sha256) for p, i in zip(pictures, inspected, strict=True)]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def check_sizes(pictures: Sequence[Picture], inspected: Sequence[Inspected]) -> None:
    """Raise ValueError, naming the first, for images that are not all of one size."""
    for picture, found in zip(pictures, inspected, strict=True):
        if found.size != inspected[0].size:
            first, other = ("x".join(map(str, i.size)) for i in (inspected[0], found))
            raise ValueError(
                f"{picture.file} is {other} where {pictures[0].file} is {first}: say "
                "--mixed_sizes to compare images of different sizes"
            )
