"""Images with prompts listed in one JSON file.

    {"keys": ["0", ...], "image_paths": ["a.png", ...], "prompts": ["a sunset", ...]}

Three lists of one length; relative image paths are looked up beside the JSON file, then in the
working directory.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from senseflow.core.draws import Draws
from senseflow.data.items import Item, Position, UnreadableItem, first_readable

LISTS = ("keys", "image_paths", "prompts")


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

    def fingerprint(self) -> str:
        """Of all prompts, and the names of the files."""
        names = [Path(path).name for path in self.paths]
        return sha256(repr((self.prompts, names)).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, position: Position) -> Item:
        read = partial(self.sample, position)
        return first_readable(read, position.item, len(self), self.max_unreadable)

    def all_prompts(self) -> Iterator[str]:
        """Of all samples, in their order."""
        return iter(self.prompts)

    def sample(self, position: Position, item: int) -> Item:
        """The data set's sample number `item` at a place of the run; raises UnreadableItem."""
        path = self.resolve(self.paths[item])
        image = read_image(path, self.resolution, self._where(position))
        return replace(self.listed(position, item), image=image)

    def listed(self, position: Position, item: int) -> Item:
        """The same without its image, of which nothing is read."""
        return Item(self.prompts[item], position.index, path=self.paths[item])

    def resolve(self, path: str) -> Path:
        """Beside the JSON file if it is there, else as given."""
        beside = self.folder / path
        return beside if beside.exists() else Path(path)

    def _where(self, position: Position) -> tuple[float, float]:
        """The crop's place in [0, 1] down and across what is left over."""
        if self.crop == "center":
            return 0.5, 0.5
        draws = Draws(self.seed, position.iteration, (position.index,))
        purpose = "crop separate" if position.separate else "crop"
        down, across = draws.uniform(purpose, 2)[0].tolist()
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


def read_image(path: Path, resolution: tuple[int, int], where: tuple[float, float]) -> Tensor:
    """The picture in a file, (3, H, W) in [-1, 1], resized and cropped as `fit` does.

    Raises UnreadableItem naming the file when it is missing, damaged or no picture.
    """
    try:
        with Image.open(path) as opened:
            picture = to_rgb(opened)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UnreadableItem(str(path), str(error)) from error
    return to_tensor(fit(picture, resolution, where))


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
