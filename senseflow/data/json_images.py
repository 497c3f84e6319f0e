"""Images with prompts listed in one JSON file.

    {"keys": ["0", ...], "image_paths": ["a.png", ...], "prompts": ["a sunset", ...]}

Three lists of one length; relative image paths are looked up beside the JSON file, then in the
working directory.
"""

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from senseflow.core.draws import Draws

logger = logging.getLogger(__name__)

LISTS = ("keys", "image_paths", "prompts")


class Position(NamedTuple):
    """Which sample of the data set stands where in the run."""

    iteration: int
    index: int  # in the iteration's global batch
    item: int  # in the data set


class Item(NamedTuple):
    """One sample, and the files that were passed over to find it."""

    image: Tensor  # (3, H, W) in [-1, 1]
    prompt: str
    index: int  # in the iteration's global batch
    unreadable: list[tuple[str, str]]  # (path, reason)


class UnreadableImagesError(RuntimeError):
    """More files could not be read than the configuration allows."""


class JsonImages(Dataset[Item]):
    """Images resized to cover `resolution` and cropped to it, with their prompts.

    crop: "center", or "random" as a function of seed, iteration and global sample index.
    An image that cannot be read is replaced by the next one in the list that can, and reported;
    more than max_unreadable in a row raise UnreadableImagesError.
    Raises ValueError naming the file when the JSON is not of the form above or holds nothing.
    """

    def __init__(
        self,
        file: Path,
        resolution: tuple[int, int],
        crop: Literal["center", "random"] = "center",
        seed: int = 0,
        max_unreadable: int = 100,
    ) -> None:
        self.resolution, self.crop, self.seed = resolution, crop, seed
        self.max_unreadable = max_unreadable
        _, self.paths, self.prompts = read_lists(file)
        self.folder = file.parent

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, position: Position) -> Item:
        unreadable = []
        for skipped in range(min(len(self), self.max_unreadable + 1)):
            item = (position.item + skipped) % len(self)
            path = self.resolve(self.paths[item])
            try:
                with Image.open(path) as picture:
                    picture = to_rgb(picture)
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                unreadable.append((str(path), str(error)))
                continue
            image = to_tensor(fit(picture, self.resolution, self._where(position)))
            return Item(image, self.prompts[item], position.index, unreadable)
        raise UnreadableImagesError(
            f"{len(unreadable)} of {len(self)} images in a row could not be read, such as "
            f"{unreadable[0][0]}: {unreadable[0][1]}"
        )

    def resolve(self, path: str) -> Path:
        """Beside the JSON file if it is there, else as given."""
        beside = self.folder / path
        return beside if beside.exists() else Path(path)

    def _where(self, position: Position) -> tuple[float, float]:
        """The crop's place in [0, 1] down and across what is left over."""
        if self.crop == "center":
            return 0.5, 0.5
        draws = Draws(self.seed, position.iteration, (position.index,))
        down, across = draws.uniform("crop", 2)[0].tolist()
        return down, across


def read_lists(file: Path) -> tuple[list[str], list[str], list[str]]:
    """keys, image_paths and prompts of a data set file, checked."""
    if not file.is_file():
        raise ValueError(f"data set {file} not found: paths.dataset names a JSON file")
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"data set {file} is not valid JSON: {error}") from error
    missing = [name for name in LISTS if not isinstance(tree, dict) or name not in tree]
    if missing:
        raise ValueError(f"data set {file} has no {', '.join(missing)}")
    for name in LISTS:
        if not isinstance(tree[name], list):
            raise ValueError(f"data set {file}: {name} is not a list")
    lengths = {name: len(tree[name]) for name in LISTS}
    if len(set(lengths.values())) > 1:
        said = ", ".join(f"{length} {name}" for name, length in lengths.items())
        raise ValueError(f"data set {file} has lists of different lengths: {said}")
    if not tree["keys"]:
        raise ValueError(f"data set {file} is empty")
    for name in LISTS[1:]:
        odd = next((i for i, text in enumerate(tree[name]) if not isinstance(text, str)), None)
        if odd is not None:
            raise ValueError(f"data set {file}: {name}[{odd}] is not text: {tree[name][odd]!r}")
    return tree["keys"], tree["image_paths"], tree["prompts"]


def to_rgb(picture: Image.Image) -> Image.Image:
    """Decode wholly, upright, in RGB; transparency becomes white.

    16-bit grey is scaled to 8 bits (Pillow would clip it to white). Raises ValueError for pixels
    whose range no one can know: 32-bit integers and floats.
    """
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I;16"):
        grey = np.asarray(picture, dtype=np.float32) / 257
        picture = Image.fromarray(grey.round().astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {picture.mode} have no known range")
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        paper = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(paper, picture)
    return picture.convert("RGB")


def fit(
    picture: Image.Image, resolution: tuple[int, int], where: tuple[float, float]
) -> Image.Image:
    """Resize so that the picture covers height x width, then crop at `where` of the rest."""
    return ImageOps.fit(
        picture,
        (resolution[1], resolution[0]),
        method=Image.Resampling.LANCZOS,
        centering=(where[1], where[0]),
    )


def to_tensor(picture: Image.Image) -> Tensor:
    """(3, H, W) float32 in [-1, 1]."""
    array = torch.from_numpy(np.array(picture, dtype=np.uint8))
    return array.permute(2, 0, 1).float() / 127.5 - 1


@dataclass
class Unreadable:
    """Counts and lists the files a run passed over, and stops it past a limit."""

    file: Path  # the list in the run folder
    limit: int
    seen: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        if self.file.exists():
            self.seen |= {row.partition("\t")[0] for row in self.file.read_text().splitlines()}

    def note(self, found: list[tuple[str, str]]) -> None:
        """Record files met in a batch."""
        for path, reason in found:
            if path in self.seen:
                continue
            self.seen.add(path)
            logger.warning("skipped %s: %s", path, reason)
            with self.file.open("a") as stream:
                stream.write(f"{path}\t{reason}\n")

    def check(self, num: int) -> None:
        """Raise UnreadableImagesError when `num` files, of all ranks together, are too many."""
        if num > self.limit:
            raise UnreadableImagesError(
                f"{num} images could not be read, data.max_unreadable allows {self.limit}; they "
                f"are listed in {self.file}"
            )
