"""Weights files of the metrics' models: read as tensors only, and wrong ones named."""

import hashlib
import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

DAMAGED = (  # what the readers of weights and configs raise
    RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError, OSError,
    SafetensorError,
)  # fmt: skip

TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "vocab.txt",
    "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip


@contextmanager
def reading(source: str | Path) -> Iterator[None]:
    """A library's error about a file of weights or a config becomes one line that names it."""
    try:
        yield
    except DAMAGED as error:
        lines = str(error).splitlines() or [repr(error)]
        reason = lines[0].partition(". ")[0]  # torch goes on to advise reading it unsafely
        raise ValueError(
            f"{source} cannot be loaded, it is damaged or of another kind: {reason}"
        ) from error


def digest_of(folder: Path, names: Iterable[str]) -> str:
    """The beginning of a sha256 of those small files of a folder that are there, and their names.

    Configs, processors and tokenizers change a value as weights do.
    """
    digest = hashlib.sha256()
    for file in (folder / name for name in names):
        if file.is_file():
            digest.update(f"{file.name}\0{file.stat().st_size}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors, or of a .pth/.pt/.bin, bare or under 'state_dict'.

    Raises ValueError naming a file that holds anything else; no code in it is run.
    """
    with reading(file):
        state: Any
        if file.suffix == ".safetensors":
            state = safetensors.torch.load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise ValueError(f"{file} is not a table of weights by name")
    return state


def fill(
    load: Callable[[], Any],
    network: nn.Module,
    file: Path,
    wanted: str,
    spare: str | tuple[str, ...] = " ",
) -> None:
    """Load weights without strictness by `load`, then raise ValueError unless all fitted.

    load: returns torch's missing and unexpected keys. spare: how keys begin that may be left over.
    """
    try:
        missing, unexpected = load()
    except RuntimeError as error:
        misfits = [line.strip() for line in str(error).splitlines() if "size mismatch" in line]
        reason = misfits[0].rstrip(".") if misfits else str(error).splitlines()[0]
        raise ValueError(
            f"{file} holds weights of another model than {wanted}: {reason}"
        ) from error
    unexpected = [key for key in unexpected if not key.startswith(spare)]
    if missing or unexpected:
        raise ValueError(
            f"{file} holds weights of another model than {wanted}: of its "
            f"{len(network.state_dict())} keys {_such(missing)} missing, and {_such(unexpected)} "
            "not part of it"
        )


def _such(keys: list[str]) -> str:
    return f"{len(keys)} (such as {sorted(keys)[0]}) are" if keys else "none are"
