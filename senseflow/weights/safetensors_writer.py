"""Safetensors files written tensor by tensor.

A file is the length of its header (8 bytes), the header (JSON: type, shape and place of every
tensor) and the tensors' bytes; all shapes are known beforehand, so no more than one tensor is in
memory, and so is the file's size.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.bool: "BOOL",
}  # as a safetensors header names them


ALIGNMENT = 64  # bytes, of the first tensor: matrix products of a mapped file round by where it is
PLAIN = {"format": "pt"}  # what a header says of the file besides its tensors


def header(shapes: Mapping[str, Tensor]) -> bytes:
    """What stands before the tensors of a file; shapes: by key, also on the meta device."""
    tree: dict[str, dict[str, Any]] = {"__metadata__": PLAIN}
    end = 0
    for key, like in shapes.items():
        start, end = end, end + like.nbytes
        place = {
            "dtype": TYPES[like.dtype],
            "shape": list(like.shape),
            "data_offsets": [start, end],
        }
        tree[key] = place
    words = json.dumps(tree, separators=(",", ":")).encode()
    words += b" " * (-(8 + len(words)) % ALIGNMENT)
    return len(words).to_bytes(8, "little") + words


def num_bytes(shapes: Mapping[str, Tensor]) -> int:
    """The size of the file that `write_safetensors` writes."""
    return len(header(shapes)) + sum(like.nbytes for like in shapes.values())


def write_safetensors(
    file: Path,
    shapes: Mapping[str, Tensor],
    tensors: Iterator[Tensor | None],
) -> None:
    """Write one file; `tensors` yields at least those of `shapes`, in that order."""
    with file.open("wb") as stream:
        stream.write(header(shapes))
        for like in shapes.values():
            tensor = next(tensors)
            assert tensor is not None and (tensor.shape, tensor.dtype) == (like.shape, like.dtype)
            # As bytes: NumPy has no bfloat16.
            stream.write(tensor.view(-1).view(torch.uint8).numpy().data)
