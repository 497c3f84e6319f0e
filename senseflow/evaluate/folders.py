"""Folders of images to measure: ours with sidecars, one per prompt and seed, or any others."""

import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from senseflow.common.files import parse_json
from senseflow.common.tables import FILE_COLUMNS, find_column
from senseflow.data.ahead import in_groups
from senseflow.data.decode import UNREADABLE, read_rgb
from senseflow.evaluate.layouts import SAMPLES, SIDECARS, seed_folders
from senseflow.sampling.job import Prompt
from senseflow.sampling.prompts import read_prompts_file

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
GRID = re.compile(r"grid(_\d+of\d+)?\.png")  # what sampling leaves beside its images
OWN = ("prompt", "index", "seed", "id", "cut", "versions")  # what may differ among images

Load = Callable[[Image.Image], Tensor]


@dataclass(frozen=True)
class Picture:
    """An image file, its place among the prompts, and its prompt if that is known."""

    file: Path
    key: str  # which prompt: the index of our sidecars; for other folders the name or number
    prompt: str | None
    made: dict[str, Any] = field(default_factory=dict)  # the settings that a sidecar tells


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


def read_folder(
    folder: Path, prompts_file: Path | None = None, column: str | None = None
) -> ImageSet:
    """The images of `folder`, or of its `seed_*` sub-folders, in the order of their prompts.

    The layouts of GenEval and T2I-CompBench are read by their sidecars.

    prompts_file: a list or table of prompts, which takes the place of the sidecars: by the images'
    names if it has a column of them (FILE_COLUMNS), as a data set has and {"file name": "prompt"},
    else one per image in the order of their names, numbers by value. column: of its prompts; None:
    by its name.

    Raises ValueError for a folder without images, an image without its sidecar where others have
    one, sidecars that tell of other settings than the first, or seeds whose prompts differ.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder of images")
    told = (
        partial(_with_prompts, prompts_file, read_prompts_file(prompts_file, named=column))
        if prompts_file
        else _with_sidecars
    )
    seeds = seed_folders(folder)
    if not seeds and prompts_file is None and any(folder.glob(f"*/{SIDECARS}/*.json")):
        images = ImageSet(folder, _read_benchmark(folder))
    else:
        images = ImageSet(folder, [told(_image_files(one)) for one in seeds or [folder]])
    for place, one in zip(seeds, images.sets, strict=False):  # a benchmark's folder has no seeds
        if difference := _difference(images.sets[0], one):
            raise ValueError(f"{seeds[0]} and {place} are of different prompts: {difference}")
    _check_made_alike(images.pictures)
    return images


def _difference(first: list[Picture], second: list[Picture]) -> str | None:
    """The first prompt that is not the same at the same place, in words."""
    told = [{picture.key: picture.prompt for picture in one} for one in (first, second)]
    for key in {**told[0], **told[1]}:
        one, other = (repr(of[key]) if key in of else "missing" for of in told)
        if one != other:
            return f"{key} is {one} in the first and {other} in the second"
    return None


def _check_made_alike(pictures: list[Picture]) -> None:
    """Raise ValueError for images whose sidecars tell of other settings than the first one's."""
    for picture in pictures:
        made, wanted = picture.made, pictures[0].made
        if made != wanted:
            differing = [k for k in {**wanted, **made} if made.get(k) != wanted.get(k)]
            said = ", ".join(f"{k} {made.get(k)}, not {wanted.get(k)}" for k in differing[:4])
            raise ValueError(
                f"{picture.file} was made with other settings than {pictures[0].file} ({said}): "
                "make them all again, or remove the old ones"
            )


def _read_benchmark(folder: Path) -> list[list[Picture]]:
    """PLACE/samples with PLACE/sidecars, a place for each prompt or category; a set per seed.

    The names of a prompt's images are in the order of their seeds.
    """
    found: dict[str, list[Picture]] = {}
    for file in sorted(folder.glob(f"*/{SAMPLES}/*.png")):
        place = file.parents[1]
        if not file.name.startswith("."):
            told = _told(file, place / SIDECARS / f"{file.stem}.json", f"{place.name}/")
            found.setdefault(told.key, []).append(told)
    rows = [found[key] for key in sorted(found)]
    if not rows:
        raise ValueError(f"{folder} holds sidecars without their images: draw them again")
    fewest, most = (pick(rows, key=len) for pick in (min, max))
    if len(fewest) != len(most):
        raise ValueError(
            f"{folder} holds {len(fewest)} images of {fewest[0].prompt!r} and {len(most)} of "
            f"{most[0].prompt!r}: draw the missing ones"
        )
    return [list(one) for one in zip(*rows, strict=True)]


def _image_files(folder: Path) -> list[Path]:
    """In the order of their names, numbers by value."""
    files = [
        file
        for file in folder.iterdir()
        if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")
        if file.with_suffix(".json").exists() or not GRID.fullmatch(file.name)
    ]
    if not files:
        raise ValueError(f"{folder} holds no images ({', '.join(SUFFIXES)})")
    return sorted(files, key=_natural)


def _natural(file: Path) -> list[tuple[int, str]]:
    """Names in order, runs of digits by their value."""
    parts = re.split(r"(\d+)", file.name)
    return [(int(part), part) if part.isdecimal() else (-1, part) for part in parts]


def _told(file: Path, sidecar: Path, prefix: str = "") -> Picture:
    """What a sidecar tells of an image; raises ValueError for one that is missing or damaged.

    prefix: of the key, before the index.
    """
    try:
        tree = parse_json(sidecar.read_bytes(), "it")
        index, prompt = int(tree["index"]), str(tree["prompt"])
    except FileNotFoundError as error:
        raise ValueError(
            f"{file} has no sidecar {sidecar.name}, where others have one: make it again, or "
            "say --prompts_file"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{sidecar} is not a sidecar with prompt and index: {error!r}") from error
    made = {name: value for name, value in tree.items() if name not in OWN}
    return Picture(file, f"{prefix}{index:05d}", prompt, made)


def _with_sidecars(files: list[Path]) -> list[Picture]:
    """In the order of their prompts; without any sidecar, no prompts."""
    if not any(file.with_suffix(".json").exists() for file in files):
        return [Picture(file, file.name, None) for file in files]
    found: dict[str, Picture] = {}
    for file in files:
        told = _told(file, file.with_suffix(".json"))
        other = found.setdefault(told.key, told)
        if other is not told:
            raise ValueError(
                f"{other.file} and {file} are both of prompt {int(told.key)}: keep one image per "
                "prompt in a folder; several seeds lie in seed_0/, seed_1/, ..."
            )
    return [found[key] for key in sorted(found, key=int)]


def _with_prompts(prompts_file: Path, prompts: list[Prompt], files: list[Path]) -> list[Picture]:
    """By the names of the files where the prompts have such a column, else in their order."""
    records = [prompt.record or {} for prompt in prompts]
    columns = {name: None for record in records for name in record}
    column = find_column(prompts_file, columns, FILE_COLUMNS)
    named = [record.get(column) for record in records] if column else []
    if named and all(isinstance(name, str) for name in named):
        return _by_name(prompts_file, prompts, list(map(str, named)), files)
    if len(prompts) != len(files):
        raise ValueError(
            f"{prompts_file} has {len(prompts)} prompts for the {len(files)} images of "
            f"{files[0].parent}"
        )
    return [
        Picture(file, f"{prompt.index:05d}", prompt.text)
        for file, prompt in zip(files, prompts, strict=True)
    ]


def _by_name(
    prompts_file: Path, prompts: list[Prompt], named: list[str], files: list[Path]
) -> list[Picture]:
    told: dict[str, str] = {}
    for path, prompt in zip(named, prompts, strict=True):
        name = Path(path).name
        if told.setdefault(name, prompt.text) != prompt.text:
            raise ValueError(f"{prompts_file} has two prompts for {name}")
    absent = [file for file in files if file.name not in told]
    if absent:
        raise ValueError(f"{prompts_file} has no prompt for {absent[0]}")
    return [Picture(file, file.name, told[file.name]) for file in files]


def check_same_prompts(images: ImageSet, reference: ImageSet) -> bool:
    """Whether both folders say their prompts; raises ValueError where these differ.

    Compared is what was drawn, not its order: both must hold the same prompts, each as often.
    """
    if None in images.prompts or None in reference.prompts:
        return False
    if Counter(images.prompts) != Counter(reference.prompts):
        raise ValueError(
            f"{images.folder} and {reference.folder} are of different prompts: "
            f"{_difference(images.sets[0], reference.sets[0])}"
        )
    return True


@dataclass(frozen=True)
class Inspected:
    """What an image's file holds, without decoding it."""

    picture: Picture
    sha256: str
    size: str  # width x height


def inspect(picture: Picture) -> Inspected:
    """Hash and measure an image file; raises ValueError naming one that is damaged."""
    data = picture.file.read_bytes()
    try:
        with Image.open(io.BytesIO(data)) as opened:
            width, height = opened.size
            opened.verify()
    except UNREADABLE as error:
        raise ValueError(f"{picture.file} cannot be read as an image: {error}") from error
    return Inspected(picture, hashlib.sha256(data).hexdigest(), f"{width}x{height}")


def digest(images: Sequence[Inspected]) -> str:
    """One hash of all images and their prompts; the folder's place does not matter."""
    told = [(one.picture.key, one.picture.prompt, one.sha256) for one in images]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def check_sizes(images: Sequence[Inspected]) -> None:
    """Raise ValueError, naming the first, for images that are not all of one size."""
    for one in images:
        if one.size != images[0].size:
            raise ValueError(
                f"{one.picture.file} is {one.size} where {images[0].picture.file} is "
                f"{images[0].size}: say --mixed_sizes to compare images of different sizes"
            )


def read_groups(
    groups: Sequence[Sequence[Picture]], load: Load, threads: int
) -> Iterator[tuple[Sequence[Picture], Tensor]]:
    """Each group and its images (B, ...), in order: threads decode and preprocess those that come.

    Raises ValueError naming the file of an image that cannot be read or used.
    """
    for group, tensors in in_groups(partial(read, load=load), groups, threads):
        yield group, _stacked(group, tensors)


def read(picture: Picture, load: Load) -> Tensor:
    """One image, decoded and preprocessed; raises ValueError naming its file."""
    try:
        decoded = read_rgb(picture.file)
    except UNREADABLE as error:
        raise ValueError(f"{picture.file} cannot be read as an image: {error}") from error
    try:
        return load(decoded)
    except ValueError as error:
        raise ValueError(f"{picture.file}: {error}") from error


def _stacked(group: Sequence[Picture], tensors: list[Tensor]) -> Tensor:
    for picture, tensor in zip(group, tensors, strict=True):
        if tensor.shape != tensors[0].shape:
            sizes = (list(t.shape[1:]) for t in (tensor, tensors[0]))
            raise ValueError(
                f"{picture.file} and {group[0].file} are of different sizes after preprocessing, "
                f"{' and '.join(map(str, sizes))}: name one in place of 0"
            )
    return torch.stack(tensors)
