"""Samples with what a cache knows of them, read by the workers while an iteration computes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset

from senseflow.common.weights_files import fault_in
from senseflow.data.cache_index import KEY_DTYPE, Part, key_of
from senseflow.data.dataset import DataSet
from senseflow.data.items import Item, Position, Samples, UnreadableItem, first_readable
from senseflow.data.json_images import JsonImages
from senseflow.data.shared import SharedArray
from senseflow.teachers.encoded import Conditioning, Encoded, KnownPrompts, Posterior


class NonFiniteRow(ValueError):
    """A row of a cache holds numbers that are not finite, which no encoder wrote."""


class Rows:
    """The rows of one part of a cache, found by their keys.

    A file is open, and mapped, only while a row of it is read: safetensors compares its size with
    its header first, so that a file cut short under a run is an error and not the end of it.
    """

    def __init__(self, folder: Path, part: Part) -> None:
        self.folder, self.fields = folder, part.fields
        self.files = [str(folder / shard.file) for shard in part.shards]
        self.starts = np.cumsum([0, *map(len, part.shards)])
        keys = np.frombuffer("".join(s.keys for s in part.shards).encode(), KEY_DTYPE)
        order = np.argsort(keys, kind="stable")  # (N,)
        self.order, self.keys = SharedArray(order), SharedArray(keys[order])

    def places(self, keys: np.ndarray) -> np.ndarray:
        """The number (N,) of the row of each key, -1 where there is none."""
        held, order = self.keys.array, self.order.array
        if not len(held):
            return np.full(len(keys), -1)
        near = np.searchsorted(held, keys).clip(max=len(held) - 1)
        return np.where(held[near] == keys, order[near], -1)

    def shards(self, places: np.ndarray) -> np.ndarray:
        """The number of the file of each row."""
        return np.searchsorted(self.starts, places, side="right") - 1

    def read(self, key: str) -> dict[str, Tensor]:
        """The row of a key, (1, ...) per field.

        Raises ValueError when it cannot be read, NonFiniteRow for numbers that are not finite.
        """
        (place,) = self.places(np.array([key], KEY_DTYPE))
        if place < 0:
            raise ValueError(f"{self.folder} has no row {key}: it is the cache of other samples")
        number = int(self.shards(place))
        file, row = self.files[number], int(place - self.starts[number])
        try:
            with safe_open(file, framework="pt") as opened:
                found = {name: opened.get_slice(name)[row : row + 1] for name in self.fields}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} {fault_in(Path(file), error)}") from error
        if bad := [name for name, value in found.items() if not value.isfinite().all()]:
            raise NonFiniteRow(f"row {row} of {file} is damaged: its {bad[0]} is not finite")
        return found

    def conditioning(self, prompt: str) -> Conditioning:
        """One encoded prompt, in place of running the text encoders: B = 1, on the host.

        Raises ValueError for one that it does not hold.
        """
        return Conditioning(**self.read(key_of(prompt)))


@dataclass(frozen=True)
class Cache:
    """What a run reads in place of its encoders' work; None: that is computed."""

    prompts: KnownPrompts | None = None
    clip: Rows | None = None
    latents: Rows | None = None
    text_dim: int | None = None  # the length of the discriminator's features of prompts

    @property
    def known(self) -> list[str]:
        """The names of its parts; equal on all ranks of a run."""
        parts = {"prompts": self.prompts, "clip": self.clip, "latents": self.latents}
        return [name for name, part in parts.items() if part is not None]

    def samples(self, dataset: Samples, see_images: bool) -> Samples:
        """The data set with what is known of its samples.

        see_images: read an image also where its posterior is known.
        """
        if not self.known:
            return dataset
        assert isinstance(dataset, DataSet)
        read = dataset.sample
        # DINOv2 looks at the real image itself, which its posterior does not replace.
        if isinstance(dataset, JsonImages) and self.latents is not None and not see_images:
            read = dataset.listed
        return CachedSamples(dataset, self, read)


@dataclass(frozen=True)
class CachedSamples(Dataset[Item]):
    """A data set whose samples bring what a cache knows of them."""

    dataset: DataSet
    cache: Cache
    sample: Callable[[Position, int], Item]  # of the data set; raises UnreadableItem

    def fingerprint(self) -> str:
        """The data set's own: what a cache knows changes no order."""
        return self.dataset.fingerprint()

    def __len__(self) -> int:
        return len(self.dataset)

    def all_prompts(self) -> Iterator[str]:
        """The prompts of all samples, in their order."""
        return self.dataset.all_prompts()

    def __getitem__(self, position: Position) -> Item:
        return first_readable(self._read, position, len(self), self.dataset.max_unreadable)

    def _read(self, position: Position, item: int) -> Item:
        found, cache = self.sample(position, item), self.cache
        try:
            encoded = Encoded(
                None if cache.prompts is None else cache.prompts.conditioning(found.prompt),
                None if cache.clip is None else cache.clip.read(key_of(found.prompt))["text"],
                None if cache.latents is None else self._posterior(cache.latents, found),
            )
        except NonFiniteRow as error:
            raise UnreadableItem(self.dataset.source(item), str(error)) from error
        return replace(found, encoded=encoded)

    def _posterior(self, rows: Rows, item: Item) -> Posterior:
        assert isinstance(self.dataset, JsonImages) and item.path is not None
        row = rows.read(key_of(item.path, item.prompt))
        if not row["readable"].item():
            path = self.dataset.resolve(item.path)
            raise UnreadableItem(str(path), "it could not be read when its latents were cached")
        return Posterior(row["mean"], row["std"])
