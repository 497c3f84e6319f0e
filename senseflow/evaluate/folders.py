"""Folders of images to measure: ours with sidecars, one per prompt and seed, or any others.

`Reader` makes batches of them: threads decode and preprocess while the model works.
"""

import hashlib
import io
import json
import re
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from senseflow.common.files import read_json
from senseflow.data.decode import UNREADABLE, read_rgb
from senseflow.data.image_lists import read_lists
from senseflow.evaluate.layouts import SAMPLES, SIDECARS, seed_folders
from senseflow.sampling.prompts import read_prompts_file

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
GRID = re.compile(r"grid(_\d+of\d+)?\.png")  # what sampling leaves beside its images
OWN = ("prompt", "index", "seed", "id", "versions")  # what images made in one way may differ in
AHEAD = 2  # batches in the making

Load = Callable[[Image.Image], Tensor]


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

    The layouts of GenEval and T2I-CompBench are read by their sidecars.

    prompts_file: .txt, .jsonl or .tsv with a prompt per image, in the order of their names (numbers
    by value), or .json: {"file name": "prompt"}, or a data set's lists. It takes the place of the
    sidecars.

    Raises ValueError for a folder without images, an image without its sidecar where others have
    one, sidecars that tell of other settings than the first, or seeds whose prompts differ.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder of images")
    seeds, first = seed_folders(folder), FirstSidecar()
    if not seeds and prompts_file is None and any(folder.glob(f"*/{SIDECARS}/*.json")):
        return ImageSet(folder, _read_benchmark(folder, first))
    sets = [_read_set(place, prompts_file, first) for place in seeds or [folder]]
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


class FirstSidecar:
    """The settings of a folder's first image, which all others must have been made with."""

    def __init__(self) -> None:
        self.first: tuple[Path, dict[str, Any]] | None = None

    def check(self, sidecar: Path, told: dict[str, Any]) -> None:
        """Raises ValueError naming the sidecar, and what differs from the first one."""
        settings = {key: value for key, value in told.items() if key not in OWN}
        self.first = self.first or (sidecar, settings)
        file, wanted = self.first
        if settings == wanted:
            return
        differing = [k for k in {**wanted, **settings} if settings.get(k) != wanted.get(k)]
        said = ", ".join(f"{k} {settings.get(k)}, not {wanted.get(k)}" for k in differing[:4])
        raise ValueError(
            f"{sidecar} is of an image made with other settings than that of {file} ({said}): make "
            "them all again, or remove the old ones"
        )


def _read_benchmark(folder: Path, first: FirstSidecar) -> list[list[Picture]]:
    """PLACE/samples with PLACE/sidecars, a place for each prompt or category; a set per seed.

    The names of a prompt's images are in the order of their seeds.
    """
    found: dict[str, list[Picture]] = {}
    for file in sorted(folder.glob(f"*/{SAMPLES}/*.png")):
        place = file.parents[1]
        if not file.name.startswith("."):
            index, prompt = _told(file, place / SIDECARS / f"{file.stem}.json", first)
            key = f"{place.name}/{index:05d}"
            found.setdefault(key, []).append(Picture(file, key, prompt))
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


def _read_set(folder: Path, prompts_file: Path | None, first: FirstSidecar) -> list[Picture]:
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
    return _with_sidecars(files, first)


def _natural(file: Path) -> list[tuple[int, str]]:
    """Names in order, runs of digits by their value."""
    parts = re.split(r"(\d+)", file.name)
    return [(int(part), part) if part.isdecimal() else (-1, part) for part in parts]


def _told(file: Path, sidecar: Path, first: FirstSidecar) -> tuple[int, str]:
    """Index and prompt; raises ValueError for a sidecar that is missing, damaged, or not alike."""
    try:
        tree = json.loads(sidecar.read_text(encoding="utf-8"))
        index, prompt = int(tree["index"]), str(tree["prompt"])
    except FileNotFoundError as error:
        raise ValueError(
            f"{file} has no sidecar {sidecar.name}, where others have one: make it again, or "
            "say --prompts_file"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{sidecar} is not a sidecar with prompt and index: {error!r}") from error
    first.check(sidecar, tree)
    return index, prompt


def _with_sidecars(files: list[Path], first: FirstSidecar) -> list[Picture]:
    found: dict[int, Picture] = {}
    for file in files:
        index, prompt = _told(file, file.with_suffix(".json"), first)
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
    prompts = read_prompts_file(prompts_file)
    if len(prompts) != len(files):
        raise ValueError(
            f"{prompts_file} has {len(prompts)} prompts for the {len(files)} images of "
            f"{files[0].parent}"
        )
    return [
        Picture(file, f"{prompt.index:05d}", prompt.text)
        for file, prompt in zip(files, prompts, strict=True)
    ]


def _prompts_by_name(file: Path) -> dict[str, str]:
    told = read_json(file)
    if "image_paths" in told:
        _, paths, prompts = read_lists(file)
        return {Path(path).name: prompt for path, prompt in zip(paths, prompts, strict=True)}
    if not all(isinstance(prompt, str) for prompt in told.values()):
        raise ValueError(f'{file} is not of the form {{"file name": "prompt", ...}}')
    return told


def check_same_prompts(images: ImageSet, reference: ImageSet) -> bool:
    """Whether both folders say their prompts; raises ValueError where these differ.

    Compared is what was drawn, not its order: both must hold the same prompts, each as often.
    """
    if None in images.prompts or None in reference.prompts:
        return False
    for one, other in ((images, reference), (reference, images)):
        surplus = Counter(one.prompts) - Counter(other.prompts)
        places = {p.key: p.prompt for p in other.sets[0]}
        for picture in one.sets[0]:
            place = places.get(picture.key)
            if picture.prompt in surplus and picture.prompt != place:
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


@dataclass(frozen=True)
class Reader:
    """How many images at a time, and how many threads prepare them."""

    batch_size: int
    threads: int

    def batches(
        self, pictures: Sequence[Picture], load: Load
    ) -> Iterator[tuple[Sequence[Picture], Tensor]]:
        """Batches of `batch_size`, in order."""
        starts = range(0, len(pictures), self.batch_size)
        return self.groups([pictures[i : i + self.batch_size] for i in starts], load)

    def groups(
        self, groups: Sequence[Sequence[Picture]], load: Load
    ) -> Iterator[tuple[Sequence[Picture], Tensor]]:
        """Each group and its images (B, ...), in order.

        Raises ValueError naming the file of an image that cannot be read or used.
        """
        pool = ThreadPoolExecutor(self.threads)
        waiting: deque[tuple[Sequence[Picture], list[Future[Tensor]]]] = deque()
        try:
            for group in groups:
                waiting.append((group, [pool.submit(read, p, load) for p in group]))
                if len(waiting) > AHEAD:
                    yield _finish(*waiting.popleft())
            while waiting:
                yield _finish(*waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)


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


def _finish(
    group: Sequence[Picture], futures: list[Future[Tensor]]
) -> tuple[Sequence[Picture], Tensor]:
    tensors = [future.result() for future in futures]
    for picture, tensor in zip(group, tensors, strict=True):
        if tensor.shape != tensors[0].shape:
            sizes = (list(t.shape[1:]) for t in (tensor, tensors[0]))
            raise ValueError(
                f"{picture.file} and {group[0].file} are of different sizes after preprocessing, "
                f"{' and '.join(map(str, sizes))}: name one in place of 0"
            )
    return group, torch.stack(tensors)
