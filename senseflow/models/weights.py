"""The weights of a diffusers component folder, read one tensor at a time."""

import json
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

NAMES = ("diffusion_pytorch_model", "model")


class ComponentWeights:
    """Lazy access by key to `<folder>/<name>.safetensors`, whole or in shards with an index.

    Raises ValueError naming the file when nothing is there, a link dangles or a file is cut short.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file_of = self._find_files()
        self._open: dict[str, safe_open] = {}

    def _find_files(self) -> dict[str, str]:
        for name in NAMES:
            index = self.folder / f"{name}.safetensors.index.json"
            single = self.folder / f"{name}.safetensors"
            if single.is_symlink() or single.exists():
                return dict.fromkeys(self._read_keys(single.name), single.name)
            if index.is_symlink() or index.exists():
                file_of = json.loads(_existing(index).read_text())["weight_map"]
                for file in sorted(set(file_of.values())):
                    _existing(self.folder / file)
                return dict(file_of)
        raise ValueError(f"no {NAMES[0]}.safetensors (or its index) in {self.folder}")

    def _read_keys(self, file: str) -> list[str]:
        return list(_open_safetensors(self.folder / file).keys())

    def __contains__(self, key: str) -> bool:
        return key in self.file_of

    def __call__(self, key: str) -> Tensor:
        file = self.file_of[key]
        if file not in self._open:
            self._open[file] = _open_safetensors(self.folder / file)
        return self._open[file].get_tensor(key)

    def require(self, keys: Iterable[str], spare: str | None = None) -> None:
        """Raise ValueError unless the files hold exactly `keys`; those starting with `spare` may be more.

        The message names the first few keys that do not fit.
        """
        wanted, held = set(keys), set(self.file_of)
        missing = sorted(wanted - held)
        extra = sorted(k for k in held - wanted if not (spare and k.startswith(spare)))
        for kind, names in (("are missing", missing), ("are not part of the network", extra)):
            if names:
                raise ValueError(
                    f"the weights in {self.folder} do not fit their config.json: {len(names)} keys "
                    f"{kind}, such as {', '.join(names[:5])}"
                )


def _existing(file: Path) -> Path:
    if file.is_symlink() and not file.exists():
        raise ValueError(f"{file} is a link to {file.readlink()}, which does not exist")
    if not file.exists():
        raise ValueError(f"{file} is missing")
    return file


def _open_safetensors(file: Path) -> safe_open:
    try:
        return safe_open(str(_existing(file)), framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is not a complete safetensors file: {error}") from error
