"""The index of a cache: which rows stand in which files, and what made them.

A cache is a folder of safetensors files and `index.json`. It has up to three parts: `prompts`
(prompt_embeds and pooled), `clip` (the VFM discriminator's feature of a prompt) and `latents` (mean
and std of a VAE's posterior). Each file of a part holds rows of it, one per key, the keys of its
rows standing in the index; so a row is found without opening a file, and read without the others.
The index is written before the files: it says what is to be there, a file is there whole or not at
all, and of each the size is known.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from senseflow.common.files import parse_json, write_whole
from senseflow.weights.safetensors_writer import TYPES, num_bytes

INDEX = "index.json"
FORMAT = 1
PARTS = ("prompts", "clip", "latents")
KEY_LENGTH = 32  # hexadecimal digits, 128 bits of a sha256
KEY_DTYPE = np.dtype(f"S{KEY_LENGTH}")
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in TYPES}


def key_of(*words: str) -> str:
    """The key of a prompt, or of an image's path (as its data set lists it) and its prompt."""
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()[:KEY_LENGTH]


def keys_of(texts: Iterable[str]) -> np.ndarray:
    """The keys of prompts, each once, in the order in which they first come, (N,)."""
    return np.array(list(dict.fromkeys(map(key_of, texts))), KEY_DTYPE)


@dataclass(frozen=True)
class Field:
    """One tensor of every row."""

    shape: tuple[int, ...]
    dtype: str  # torch's name

    @classmethod
    def of(cls, tensor: Tensor) -> "Field":
        """The field whose rows are like this tensor."""
        return cls(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))

    def rows(self, num: int) -> Tensor:
        """A tensor of `num` rows, on the meta device."""
        return torch.empty(num, *self.shape, dtype=DTYPES[self.dtype], device="meta")


@dataclass(frozen=True)
class Shard:
    """One safetensors file of a part, and the keys of its rows."""

    file: str
    keys: str  # of its rows, one after the other

    def __len__(self) -> int:
        return len(self.keys) // KEY_LENGTH

    @property
    def split(self) -> list[str]:
        """The keys of its rows."""
        return [
            self.keys[start : start + KEY_LENGTH] for start in range(0, len(self.keys), KEY_LENGTH)
        ]


@dataclass(frozen=True)
class Part:
    """One kind of rows: what they are made with, their tensors, their files."""

    made_with: dict[str, Any]  # what the rows depend on, by the words an error names it with
    versions: dict[str, str]  # of libraries
    fields: dict[str, Field]
    shards: tuple[Shard, ...] = ()

    def shapes(self, shard: Shard) -> dict[str, Tensor]:
        """The tensors of a file, on the meta device."""
        return {name: field.rows(len(shard)) for name, field in self.fields.items()}

    @property
    def row_bytes(self) -> int:
        """The bytes of one row, without the header of its file."""
        return sum(field.rows(1).nbytes for field in self.fields.values())

    def fault(self, folder: Path, shard: Shard) -> str | None:
        """What is wrong with a file; None when it is whole."""
        file, expected = folder / shard.file, num_bytes(self.shapes(shard))
        try:
            size = file.stat().st_size
        except FileNotFoundError:
            return f"{file} is not there"
        return None if size == expected else f"{file} has {size} bytes, not {expected}: damaged"


def read_index(folder: Path) -> dict[str, Part]:
    """The parts by name; raises ValueError for a folder that is no cache."""
    file = folder / INDEX
    if not file.is_file():
        raise ValueError(f"{folder} is not a cache: it has no {INDEX}")
    try:
        tree = parse_json(file.read_bytes(), "it")
        if tree["format"] != FORMAT:
            raise ValueError(f"format {tree['format']}; this version reads format {FORMAT}")
        return {name: _part(tree["parts"][name]) for name in PARTS if name in tree["parts"]}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not the index of a cache, or is damaged: {error!r}") from error


def _part(tree: dict[str, Any]) -> Part:
    fields = {k: Field(tuple(v["shape"]), v["dtype"]) for k, v in tree["fields"].items()}
    if unknown := [field.dtype for field in fields.values() if field.dtype not in DTYPES]:
        raise ValueError(f"dtype {unknown[0]}")
    shards = tuple(Shard(shard["file"], shard["keys"]) for shard in tree["shards"])
    return Part(dict(tree["made_with"]), dict(tree["versions"]), fields, shards)


def write_index(folder: Path, parts: dict[str, Part]) -> None:
    """Replace index.json, whole or not at all."""
    tree = {"format": FORMAT, "parts": {name: asdict(part) for name, part in parts.items()}}
    write_whole(folder / INDEX, json.dumps(tree, indent=1) + "\n")


def differences(made_with: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """`name: value in the cache, value here` where two differ; None here is not compared."""
    return [
        f"{name}: {_short(made_with.get(name))} in the cache, {_short(here.get(name))} here"
        for name in dict.fromkeys([*made_with, *here])
        if made_with.get(name) != here.get(name) and not (name in here and here[name] is None)
    ]


def _short(value: Any) -> str:
    """Twelve digits of a fingerprint."""
    words = "none" if value is None else str(value)
    return words[:12] if len(words) == 64 else words
