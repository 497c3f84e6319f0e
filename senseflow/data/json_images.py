"""Images with prompts listed in one JSON file (`senseflow.data.image_lists`)."""

from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from senseflow.common.pictures import to_tensor
from senseflow.common.tables import text_fault
from senseflow.core.draws import Draws
from senseflow.data.decode import JPEG, UNREADABLE, box_of, fit, open_image, to_rgb, why_not
from senseflow.data.image_lists import read_lists, resolve
from senseflow.data.items import Item, Position, UnreadableItem, first_readable
from senseflow.data.shared import Texts


class JsonImages(Dataset[Item]):
    """Images resized to cover `resolution` and cropped to it, with their prompts.

    crop: "center", or "random" as a function of seed, iteration and global sample index.
    An image that cannot be read, or a prompt that no tokenizer takes, is replaced by the next one
    in the list that can, and reported; more than max_unreadable in a row raise
    UnreadableImagesError.
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
        _, paths, prompts = read_lists(file)
        self.paths, self.prompts = Texts(paths), Texts(prompts)
        self.folder = file.parent

    def fingerprint(self) -> str:
        """A digest of all prompts and of the names of the files."""
        # Without folders: each node may keep the images in a place of its own.
        names = [Path(path).name for path in self.paths]
        return sha256(repr(([*self.prompts], names)).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, position: Position) -> Item:
        return first_readable(self.sample, position, len(self), self.max_unreadable)

    def all_prompts(self) -> Iterator[str]:
        """The prompts of all samples, in their order; those no tokenizer takes are left out."""
        return (prompt for prompt in self.prompts if text_fault(prompt) is None)

    def sample(self, position: Position, item: int) -> Item:
        """The data set's sample number `item` at a place of the run; raises UnreadableItem."""
        listed, path = self.listed(position, item), self.resolve(self.paths[item])
        image = read_image(path, self.resolution, self._where(position))
        return replace(listed, image=image)

    def listed(self, position: Position, item: int) -> Item:
        """One sample without its image, of which nothing is read; raises UnreadableItem."""
        prompt, path = self.prompts[item], self.paths[item]
        if why := text_fault(prompt):
            raise UnreadableItem(f"{self.resolve(path)} (row {item})", f"its prompt holds {why}")
        return Item(prompt, position.index, path=path)

    def source(self, item: int) -> str:
        """How a sample is called where it is passed over."""
        return str(self.resolve(self.paths[item]))

    def resolve(self, path: str) -> Path:
        """Beside the JSON file if it is there, else as given."""
        return resolve(self.folder, path)

    def _where(self, position: Position) -> tuple[float, float]:
        """The crop's place in [0, 1] down and across what is left over."""
        if self.crop == "center":
            return 0.5, 0.5
        draws = Draws(self.seed, position.iteration, (position.index,))
        purpose = "crop separate" if position.separate else "crop"
        down, across = draws.uniform(purpose, 2)[0].tolist()
        return down, across


def read_image(path: Path, resolution: tuple[int, int], where: tuple[float, float]) -> Tensor:
    """The picture in a file, (3, H, W) in [-1, 1], resized to cover H x W and cropped at `where`.

    Raises UnreadableItem naming the file when it is missing, damaged or no picture.
    """
    try:
        with open_image(path) as opened:
            picture, is_jpeg = to_rgb(opened), opened.format in JPEG
    except UNREADABLE as error:
        raise UnreadableItem(str(path), why_not(error)) from error
    # What is stored exactly is resized as it always was; photos are large, and not exact.
    resize = fit_photo if is_jpeg else fit_exactly
    return resize(picture, resolution, where)


def fit_exactly(
    picture: Image.Image, resolution: tuple[int, int], where: tuple[float, float]
) -> Tensor:
    """An RGB picture as (3, H, W) in [-1, 1], by `fit`."""
    return to_tensor(fit(picture, resolution, where))


def fit_photo(
    picture: Image.Image, resolution: tuple[int, int], where: tuple[float, float]
) -> Tensor:
    """An RGB picture as (3, H, W) in [-1, 1], for less work than `fit` takes (docs/benchmarks.md).

    By torch's bicubic filter (Keys' with a = -0.5, Pillow's own) in 8 bits, which widens with the
    reduction; cut at whole pixels of the picture.
    """
    rows, columns = box_of(picture.size, resolution, where)
    pixels = torch.from_numpy(np.asarray(picture)[rows, columns].copy()).permute(2, 0, 1)[None]
    fitted: Tensor = F.interpolate(pixels, resolution, mode="bicubic", antialias=True)[0]
    return fitted.float().div_(127.5).sub_(1)
