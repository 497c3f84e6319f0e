"""DMD2's .pt shards of latents: {"latents": (n, C, h, w) float16, "prompts": n texts}, in NumPy.

torch.save wrote them with pickle protocol 5, which torch.load(weights_only=True) cannot read. Here
a pickle is never executed either: every name in it stands for a function of this file that knows
arrays of numbers and of text and nothing else, and any other name is refused.
"""

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from senseflow.common.weights_files import DAMAGES, fault_of, words_of

ARRAY_TYPES = re.compile(r"f2|f4|U\d+")
PICKLE = "data.pkl"


def read_shard(file: Path) -> tuple[np.ndarray, list[str]]:
    """Latents (n, C, h, w), float16 or float32, and their n prompts.

    Shards of torch tensors and lists of text are read too. Raises ValueError naming the file and
    what was found in it when it is no such shard.
    """
    tree = _load(file)
    if not isinstance(tree, dict) or not {"latents", "prompts"} <= tree.keys():
        found = f"the keys {list(tree)[:5]}" if isinstance(tree, dict) else f"a {_kind(tree)}"
        raise ValueError(f"{file} is not a shard of DMD2: it holds {found}, not latents, prompts")
    latents, prompts = tree["latents"], tree["prompts"]
    if isinstance(latents, torch.Tensor) and latents.is_floating_point():
        latents = (latents if latents.dtype == torch.float16 else latents.float()).numpy()
    if not isinstance(latents, np.ndarray) or latents.dtype.kind != "f" or latents.ndim != 4:
        raise ValueError(f"{file}: latents are {_kind(latents)}, not numbers (n, C, h, w)")
    if isinstance(prompts, np.ndarray):
        prompts = prompts.tolist()
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"{file}: prompts are {_kind(tree['prompts'])}, not a list of texts")
    if len(prompts) != len(latents):
        raise ValueError(f"{file} holds {len(latents)} latents and {len(prompts)} prompts")
    return latents, prompts


def _load(file: Path) -> Any:
    if not file.is_file():  # a pipe, whose reader would wait for ever
        raise ValueError(f"{file} is no file")
    try:
        with zipfile.ZipFile(file) as archive:
            name = next((n for n in archive.namelist() if n.endswith(f"/{PICKLE}")), None)
            if name is None:
                raise ValueError(f"it holds no {PICKLE}")
            with archive.open(name) as stream:
                tree = _ShardUnpickler(stream).load()
    except _TorchTensors:
        return _load_tensors(file)
    except DAMAGES as error:
        raise ValueError(f"{file} {_fault(file, error)}") from error
    if isinstance(tree, dict):
        return {k: v.value if isinstance(v, _Array) else v for k, v in tree.items()}
    return tree


def _load_tensors(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except DAMAGES as error:
        raise ValueError(f"{file} {_fault(file, error)}") from error


def _fault(file: Path, error: Exception) -> str:
    """What is wrong with it, by the file where that tells, else by the error."""
    known = fault_of(file)
    return known or f"is damaged or not a shard of DMD2: {type(error).__name__} {words_of(error)}"


def _kind(value: Any) -> str:
    if isinstance(value, np.ndarray | torch.Tensor):
        return f"{value.dtype} {list(value.shape)}"
    return type(value).__name__


class _TorchTensors(Exception):
    """The pickle refers to tensors beside it."""


class _ShardUnpickler(pickle.Unpickler):
    """Builds arrays of numbers and text through the functions below."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" or module.startswith("torch."):
            raise _TorchTensors
        module = module.replace("numpy.core", "numpy._core")  # as NumPy 1 wrote it
        if (module, name) not in _STAND_INS:
            raise pickle.UnpicklingError(f"{module}.{name} is refused: it is not part of an array")
        return _STAND_INS[module, name]

    def persistent_load(self, pid: Any) -> NoReturn:
        raise _TorchTensors


class _Dtype:
    """Stands for numpy.dtype."""

    def __init__(self, name: Any, *_: Any) -> None:
        if not isinstance(name, str) or not ARRAY_TYPES.fullmatch(name):
            raise pickle.UnpicklingError(f"an array of the type {name!r}")
        self.name, self.order = name, "<"

    def __setstate__(self, state: Any) -> None:
        self.order = {"<": "<", ">": ">"}[state[1]]

    def array(self, data: Any, shape: Any, order: Any) -> np.ndarray:
        """From bytes, which must be as many as the shape needs."""
        flat: np.ndarray = np.frombuffer(data, np.dtype(self.order + self.name))
        return flat.reshape(shape, order="F" if order == "F" else "C")


class _Array:
    """Stands for an array until its state is read, as protocols below 5 write it."""

    def __init__(self, *_: Any) -> None:
        self.value: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        self.value = _from_buffer(data, dtype, shape, "F" if fortran else "C")


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any, *_: Any) -> np.ndarray:
    if not isinstance(dtype, _Dtype) or not isinstance(data, bytes | bytearray):
        raise pickle.UnpicklingError("an array without its type or bytes")
    return dtype.array(data, shape, order)


def _encode(text: Any, encoding: Any) -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in the encoding {encoding!r}")
    return text.encode("latin1")


_STAND_INS = {
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): "ndarray",
    ("numpy._core.numeric", "_frombuffer"): _from_buffer,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("_codecs", "encode"): _encode,
}
