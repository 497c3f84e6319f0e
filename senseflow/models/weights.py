"""Weights in safetensors, whole or in shards, read one tensor at a time."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

NAMES = ("diffusion_pytorch_model", "model")
SUFFIXES = (".safetensors.index.json", ".safetensors")


@dataclass(frozen=True)
class Weights:
    """Tensors by key, read when asked for."""

    source: Path
    keys: list[str]
    read: Callable[[str], Tensor]

    def require(self, keys: Iterable[str], spare: str | None = None) -> None:
        """Raise ValueError unless the files hold exactly `keys`, and any that begin with `spare`.

        The message names the first few keys that do not fit.
        """
        wanted, held = set(keys), set(self.keys)
        missing = sorted(wanted - held)
        extra = sorted(k for k in held - wanted if not (spare and k.startswith(spare)))
        for kind, names in (("are missing", missing), ("are not part of the network", extra)):
            if names:
                raise ValueError(
                    f"the weights in {self.source} do not fit their config.json: {len(names)} keys "
                    f"{kind}, such as {', '.join(names[:5])}"
                )


def component_weights(folder: Path) -> Weights:
    """The weights of a diffusers component folder.

    Raises ValueError naming the file when nothing is there, a link dangles or a file is damaged.
    """
    candidates = [folder / (name + suffix) for name in NAMES for suffix in SUFFIXES]
    for file in candidates:
        if file.is_symlink() or file.exists():
            return open_index(file) if file.suffix == ".json" else open_safetensors(file)
    raise ValueError(f"no {NAMES[0]}.safetensors (or its index) in {folder}")


def open_safetensors(file: Path) -> Weights:
    """One safetensors file."""
    try:
        opened = safe_open(str(existing(file)), framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged or not a safetensors file: {error}") from error
    return Weights(file, list(opened.keys()), opened.get_tensor)


def open_index(file: Path) -> Weights:
    """The shards a `.safetensors.index.json` lists, which must hold every key of it."""
    try:
        shard_of = dict(json.loads(existing(file).read_text())["weight_map"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not an index of safetensors shards: {error!r}") from error
    shards = {name: open_safetensors(file.parent / name) for name in set(shard_of.values())}
    lost = [key for key, name in shard_of.items() if key not in shards[name].keys]
    if lost:
        raise ValueError(f"{file} names {len(lost)} keys its shards lack, such as {lost[0]}")
    return Weights(file, list(shard_of), lambda key: shards[shard_of[key]].read(key))


def existing(file: Path) -> Path:
    """The file itself; raises ValueError when it is missing or a link to nothing."""
    if file.is_symlink() and not file.exists():
        raise ValueError(f"{file} is a link to {file.readlink()}, which does not exist")
    if not file.exists():
        raise ValueError(f"{file} is missing")
    return file
