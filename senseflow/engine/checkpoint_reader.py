"""Checkpoints as others may hand them over: the index and the tensors are read, no code is run.

torch's own reader takes the index, `.metadata`, as a pickle that may name any function, and so it
does the small values beside the tensors.
"""

import io
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from senseflow.common.weights_files import DAMAGES, fault_of, words_of
from senseflow.engine.disk import cause
from senseflow.weights.stored import Weights

INDEX = ".metadata"
NETWORK = "generator.network."  # how the keys of the student begin in a checkpoint
EMA = "ema."
LAYOUTS = {str(torch.strided): torch.strided}  # of the tensors of networks and optimizers
NAMES: dict[tuple[str, str], Callable[..., Any]] = {  # all that an index may name, besides types
    ("pathlib", "PosixPath"): PurePosixPath,  # where it was written; this one opens nothing
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): LAYOUTS.__getitem__,
    (filesystem.__name__, "_StorageInfo"): filesystem._StorageInfo,
    **{
        (metadata.__name__, name): getattr(metadata, name)
        for name in (
            *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex"),
            *("StorageMeta", "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
        )
    },
}


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        kind = getattr(torch, name, None) if module == "torch" else None
        if isinstance(kind, torch.dtype):
            return kind
        if (module, name) not in NAMES:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no index does")
        return NAMES[module, name]


def read_index(folder: Path) -> dcp.Metadata:
    """Which tensors a checkpoint holds and where; raises ValueError, naming the file, for an index
    that is damaged or names anything but the parts of one, of which nothing is called."""
    file = folder / INDEX
    try:
        with file.open("rb") as stream:
            index = _IndexUnpickler(stream).load()
        if not isinstance(index, dcp.Metadata) or index.storage_data is None:
            raise ValueError(f"it is a {type(index).__name__}")
    except DAMAGES as error:
        known = fault_of(file)
        fault = known or f"is not the index of a checkpoint: {words_of(error)}"
        raise ValueError(f"{file} {fault}") from error
    index.storage_meta = metadata.StorageMeta()
    return index


class IndexedReader(dcp.FileSystemReader):
    """torch's reader of a checkpoint, whose index is read once, by `read_index`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self.index = read_index(folder)

    def read_metadata(self, *args: Any, **kwargs: Any) -> dcp.Metadata:
        """The index, as the others ask for it."""
        return self.index


class Planner(dcp.DefaultLoadPlanner):
    """torch's plan of what is read where; numbers and texts beside the tensors are no code."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Put a value in its place; raises ValueError for one that names a function."""
        try:
            torch.load(value, weights_only=True)  # or it is none that torch's reader may run
        except DAMAGES as error:
            raise ValueError(f"{read_item.dest_index.fqn}: {words_of(error)}") from error
        value.seek(0)
        super().load_bytes(read_item, value)


class OpenCheckpoint:
    """The tensors of a checkpoint, read one at a time and unsharded, without process groups."""

    def __init__(self, folder: Path) -> None:
        self.reader = IndexedReader(folder)
        held = self.reader.index.state_dict_metadata
        self.shapes = {k: v for k, v in held.items() if isinstance(v, TensorStorageMetadata)}

    def under(self, prefix: str) -> dict[str, str]:
        """The keys that begin with `prefix`, by what follows it."""
        return {k.removeprefix(prefix): k for k in self.shapes if k.startswith(prefix)}

    def weights(self, keys: dict[str, str]) -> Weights:
        """A network's tensors by its own keys, read in float32 when asked for."""
        return Weights(Path(self.reader.path), list(keys), lambda key: _Kept(self, keys[key]))

    def student(self, ema: bool) -> dict[str, str]:
        """Where each tensor of the student (or its EMA, with the student's buffers) is kept."""
        keys, averaged = self.under(NETWORK), self.under(EMA)
        if ema and not averaged:
            raise ValueError(f"{self.reader.path} holds no EMA: the run was trained without one")
        return keys | averaged if ema else keys

    def read(self, key: str, dtype: torch.dtype) -> Tensor:
        """One tensor by its key in the checkpoint, unsharded, in host memory; raises OSError."""
        shape = self.shapes[key]
        value = torch.empty(shape.size, dtype=shape.properties.dtype)
        try:
            with warnings.catch_warnings(action="ignore"):  # that it reads in a single process
                dcp.load({key: value}, storage_reader=self.reader, no_dist=True)
        except dcp.CheckpointException as error:
            raise OSError(f"reading {self.reader.path} failed: {cause(error)}") from error
        return value.to(dtype)


class _Kept:
    """A tensor of a checkpoint, which is read whole, one at a time."""

    def __init__(self, stored: OpenCheckpoint, key: str) -> None:
        self.stored, self.key = stored, key
        self.shape = stored.shapes[key].size

    def __getitem__(self, rows: Any, /) -> Tensor:
        return self.stored.read(self.key, torch.float32)[rows]
