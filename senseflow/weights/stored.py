"""Weights in safetensors, whole or in shards, read one tensor at a time; and pickles of old."""

import json
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from mmap import ACCESS_COPY, ALLOCATIONGRANULARITY, mmap
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Size, Tensor

from senseflow.common.files import read_json
from senseflow.common.weights_files import DAMAGES, fault_in

NAMES = ("diffusion_pytorch_model", "model")  # of diffusers, of transformers
LORA_FILE = "pytorch_lora_weights.safetensors"
SUFFIXES = (".safetensors.index.json", ".safetensors")
PICKLES = ("diffusion_pytorch_model.bin", "pytorch_model.bin")
FILE = re.compile(  # a variant such as fp16 stands before the last suffix, or an index's
    rf"(?P<name>{'|'.join(NAMES)})(\.(?P<variant>\w+))?\.safetensors"
    r"(?P<index>\.index(\.(?P<of_index>\w+))?\.json)?"
)
SHARD = re.compile(r".+-\d+-of-\d+(\.\w+)?\.safetensors")
PEFT_LAYER = ".base_layer."  # in keys of a network that peft's adapters are still on
UNLOADED = (
    "A LoRA was still on it when it was saved: say fuse_lora(), then unload_lora_weights(), then "
    "save_pretrained()"
)
TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}  # as a safetensors header names them


class Stored(Protocol):
    """A tensor that may lie in a file; indexing reads that part of it alone, [...] all of it."""

    @property
    def shape(self) -> Size:
        """The tensor's shape, known without reading it."""
        ...

    def __getitem__(self, rows: Any, /) -> Tensor:
        """A part of the tensor."""
        ...


@dataclass(frozen=True)
class InFile:
    """A tensor of a safetensors file, whose bytes alone are mapped while rows are read.

    What has been read of a mapped file counts as this process's memory until the map is gone, and
    that is with the tensor this returns. start: where its bytes begin in the file.
    """

    file: Path
    key: str
    shape: Size
    dtype: torch.dtype
    start: int

    def __getitem__(self, rows: Any) -> Tensor:
        # safetensors would read the header, of all tensors, for each of them.
        num, dtype = self.shape.numel(), self.dtype
        if not num:
            return torch.empty(self.shape, dtype=dtype)[rows]
        skipped = self.start % ALLOCATIONGRANULARITY
        size, page = skipped + num * dtype.itemsize, self.start - skipped
        with self.file.open("rb", buffering=0) as stream:
            mapped = mmap(stream.fileno(), size, access=ACCESS_COPY, offset=page)
        values = torch.frombuffer(mapped, dtype=dtype, count=num, offset=skipped)
        return values.view(self.shape)[rows]


@dataclass(frozen=True)
class Computed:
    """A tensor that is made of others, whole, whenever any of it is asked for."""

    shape: Size
    make: Callable[[], Tensor]

    def __getitem__(self, rows: Any) -> Tensor:
        return self.make()[rows]


@dataclass(frozen=True)
class Weights:
    """Tensors by key, read when asked for."""

    source: Path
    keys: list[str]
    read: Callable[[str], Stored]
    types: frozenset[str] = frozenset()  # as safetensors call them, where the files say

    def tensor(self, key: str) -> Tensor:
        """All of a tensor; raises ValueError when its file is damaged."""
        try:
            return self.read(key)[...]
        except (SafetensorError, RuntimeError, ValueError, OSError) as error:
            raise ValueError(f"{self.source} is damaged: {error}") from error

    def require(
        self,
        wanted: Mapping[str, Stored],
        config: str = "their config.json",
        spare: str | None = None,
    ) -> None:
        """Raise ValueError unless the files hold exactly the keys of `wanted`, in its shapes, and
        any that begin with `spare`.

        config: whose keys those are. The message names the first few keys that do not fit.
        """
        held, strange = set(self.keys), set(self.keys) - wanted.keys()
        other = [
            f"{key} {list(shape)}, not {list(wanted[key].shape)}"
            for key in wanted
            if key in held and (shape := self.read(key).shape) != wanted[key].shape
        ]
        found = {
            "missing": [key for key in wanted if key not in held],
            "not part of the network": sorted(
                key for key in strange if not (spare and key.startswith(spare))
            ),
            "of another shape": other,
        }
        if any(found.values()):
            said = "; ".join(
                f"{len(keys)} {kind} ({', '.join(keys[:5])}{', ...' if len(keys) > 5 else ''})"
                for kind, keys in found.items()
                if keys
            )
            if any(PEFT_LAYER in key for key in strange):
                said += f". {UNLOADED}"
            raise ValueError(f"the weights in {self.source} do not fit {config}: {said}")


def component_weights(folder: Path) -> Weights:
    """The weights of a component folder of diffusers or transformers.

    Raises ValueError naming the file when nothing is there, a link dangles or a file is damaged.
    """
    file = component_file(folder)
    if file.suffix == ".json":
        return open_index(file)
    return open_safetensors(file) if file.suffix == ".safetensors" else open_pickle(file)


def component_file(folder: Path) -> Path:
    """The file that stands for a component's weights: the index of their shards, or all of them.

    Where there are only those of a variant, such as fp16, it is theirs. Raises ValueError, naming
    what is there, when it cannot be told or is not there.
    """
    variants: dict[str, dict[tuple[int, bool], Path]] = {}
    # A dangling link counts: it is what is wrong, and is named, not passed over.
    for file in sorted(folder.glob("*.*")):
        if found := FILE.fullmatch(file.name):
            variant = found["variant"] or found["of_index"] or ""
            order = NAMES.index(found["name"]), not found["index"]
            variants.setdefault(variant, {})[order] = file
    if "" not in variants and len(variants) > 1:
        raise ValueError(
            f"{folder} holds weights in the variants {' and '.join(variants)} alone: leave one of "
            "them there"
        )
    if variants:
        files = variants.get("") or next(iter(variants.values()))
        return files[min(files)]
    pickles = [folder / name for name in PICKLES if (folder / name).exists()]
    return pickles[0] if pickles else _not_there(folder)


def _not_there(folder: Path) -> NoReturn:
    shards = sorted(file for file in folder.glob("*") if SHARD.fullmatch(file.name))
    if shards:
        name = re.sub(r"-\d+-of-\d+", "", shards[0].name)
        raise ValueError(
            f"{folder} holds {len(shards)} shards, such as {shards[0].name}, and not their index "
            f"({name}.index.json), which says what is in them: download it again"
        )
    if pickles := sorted(folder.glob("*.bin*")):
        raise ValueError(
            f"{folder} holds shards of pickles ({pickles[0].name}): load the pipeline in diffusers "
            "and save_pretrained it, which writes safetensors"
        )
    raise ValueError(f"no {' or '.join(NAMES)}.safetensors (or its index) in {folder}")


def plain_name(name: str) -> str:
    """The name of a weights file or of an index without the mark of a variant."""
    found = FILE.fullmatch(name)
    if not found:
        return name
    return f"{found['name']}.safetensors{'.index.json' if found['index'] else ''}"


def component_files(folder: Path) -> list[Path]:
    """The files with a component's tensors, an index's shards in the order of their names."""
    file = component_file(folder)
    if file.suffix != ".json":
        return [file]
    return sorted({file.parent / name for name in shards_of(file).values()})


def open_safetensors(file: Path) -> Weights:
    """The tensors of one safetensors file; raises ValueError when it is damaged."""
    try:
        with safe_open(str(existing(file)), framework="pt") as opened:
            keys = opened.keys()
        with file.open("rb") as stream:  # which safetensors found to be right
            size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(size))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} {fault_in(file, error)}") from error
    types = frozenset(header[key]["dtype"] for key in keys)
    if unknown := types - TYPES.keys():
        raise ValueError(f"{file} holds tensors of type {min(unknown)}, which is not read")

    def read(key: str) -> InFile:
        entry = header[key]
        start = 8 + size + entry["data_offsets"][0]
        return InFile(file, key, Size(entry["shape"]), TYPES[entry["dtype"]], start)

    return Weights(file, list(keys), read, types)


def open_index(file: Path) -> Weights:
    """The shards a `.safetensors.index.json` lists, which must hold every key of it."""
    shard_of = shards_of(file)
    shards = {name: open_safetensors(file.parent / name) for name in set(shard_of.values())}
    lost = [key for key, name in shard_of.items() if key not in shards[name].keys]
    if lost:
        raise ValueError(f"{file} names {len(lost)} keys its shards lack, such as {lost[0]}")
    types = frozenset[str]().union(*(shard.types for shard in shards.values()))
    return Weights(file, list(shard_of), lambda key: shards[shard_of[key]].read(key), types)


def shards_of(index: Path) -> dict[str, str]:
    """The name of the shard with each key, as an index says; raises ValueError when it is none."""
    tree = read_json(existing(index))
    try:
        return dict(tree["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index} is not an index of safetensors shards: {error!r}") from error


def open_pickle(file: Path) -> Weights:
    """The tensors of a file of `torch.save`; raises ValueError for one that holds anything else."""
    try:
        tree = torch.load(
            file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
        )
    except DAMAGES as error:
        raise ValueError(f"{file} {fault_in(file, error)}") from error
    if not isinstance(tree, dict) or not all(torch.is_tensor(value) for value in tree.values()):
        raise ValueError(f"{file} does not hold tensors alone")
    return Weights(file, list(tree), tree.__getitem__)


def existing(file: Path) -> Path:
    """The file itself; raises ValueError when it is missing or a link to nothing."""
    if file.is_symlink() and not file.exists():
        raise ValueError(f"{file} is a link to {file.readlink()}, which does not exist")
    if not file.exists():
        raise ValueError(f"{file} is missing")
    return file
