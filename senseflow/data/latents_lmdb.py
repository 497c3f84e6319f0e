"""VAE latents with prompts in an LMDB, in the format of DMD2.

    latents_shape      text, "N C h w"
    latents_<i>_data   float16 bytes (little-endian), C x h x w, for i from 0 to N - 1
    prompts_<i>_data   UTF-8

DMD2's latents are samples of the posterior, already multiplied by the VAE's scaling factor. An LMDB
that `senseflow.data.convert` wrote says so itself, and which VAE it was, under the keys below.
"""

import hashlib
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import lmdb
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from senseflow.common.files import read_json
from senseflow.data.items import Item, Position, UnreadableItem, first_readable
from senseflow.weights.stored import component_files, existing

logger = logging.getLogger(__name__)

DATA = "data.mdb"
DTYPE = np.dtype("<f2")
SHAPE_KEY = b"latents_shape"
SCALED_KEY = b"latents_scaled"  # "1": (z - shift) * factor, as the diffusion model sees them
FACTOR_KEY = b"latents_scaling_factor"
SHIFT_KEY = b"latents_shift_factor"
VAE_KEY = b"latents_vae_sha256"
CONVERSION_KEY = b"conversion"  # what senseflow.data.convert was asked, there from its start

# LMDB opens a file once per process: the data sets of a process share it. A forked process may use
# its parent's, which has neither locks nor a table of readers.
_environments: WeakValueDictionary[str, lmdb.Environment] = WeakValueDictionary()


def latents_key(row: int) -> bytes:
    """The key of a row's latents in DMD2's layout."""
    return f"latents_{row}_data".encode()


def prompt_key(row: int) -> bytes:
    """The key of a row's prompt in DMD2's layout."""
    return f"prompts_{row}_data".encode()


@dataclass(frozen=True)
class LatentsScaling:
    """From a VAE's latents to those its diffusion model sees: (z - shift) * factor."""

    factor: float
    shift: float = 0.0
    vae_sha256: str | None = None  # of the VAE's weights; None: not compared

    @classmethod
    def of_vae(cls, folder: Path) -> "LatentsScaling":
        """What a diffusers VAE folder says; raises ValueError when it is none."""
        config = read_vae_config(folder)
        for name in ("latents_mean", "latents_std"):
            if config.get(name) is not None:
                raise ValueError(
                    f"{folder / 'config.json'}: {name} is given, and latents are scaled by one "
                    "scaling_factor and shift_factor for all channels"
                )
        factor, shift = config.get("scaling_factor"), config.get("shift_factor") or 0.0
        if not isinstance(factor, int | float) or not isinstance(shift, int | float):
            raise ValueError(f"{folder / 'config.json'} has no scaling_factor: {factor!r}")
        return cls(float(factor), float(shift), vae_sha256(folder))

    def apply(self, latents: Tensor) -> Tensor:
        """The VAE's latents (..., C, h, w) as the diffusion model sees them."""
        return (latents - self.shift) * self.factor


def read_vae_config(folder: Path) -> dict[str, Any]:
    """The config.json of a diffusers VAE folder; raises ValueError for another VAE's."""
    file = folder / "config.json"
    config = read_json(file)
    if (name := config.get("_class_name", "AutoencoderKL")) != "AutoencoderKL":
        raise ValueError(
            f"{file} is of the class {name}, and an LMDB holds latents of an AutoencoderKL: train "
            "from images, or from a cache of them"
        )
    if "latent_channels" not in config:
        raise ValueError(f"{file} is not the config of a VAE: it has no latent_channels")
    return config


def vae_sha256(folder: Path) -> str:
    """The sha256 of the weights in a VAE folder; of shards, of all. Raises ValueError for none."""
    digest = hashlib.sha256()
    for file in component_files(folder):
        with existing(file).open("rb") as stream:
            hashlib.file_digest(stream, lambda: digest)
    return digest.hexdigest()


class LatentsLmdb(Dataset[Item]):
    """Latents (C, h, w) and prompts of an LMDB folder, indexed by position.

    shape: (C, h, w) of the teacher at the run's resolution.
    scaled: whether the stored latents are scaled already; None: what the LMDB says, and where it
    says nothing, as DMD2's are.
    A row of non-finite numbers or a prompt that is not UTF-8 is replaced by the next row and
    reported; more than max_unreadable in a row raise UnreadableImagesError.
    Raises ValueError, here, for a folder that is no whole LMDB of such latents, and when read, for
    a row that is missing or of another length.
    """

    def __init__(
        self,
        folder: Path,
        shape: tuple[int, int, int],
        scaling: LatentsScaling,
        scaled: bool | None = None,
        max_unreadable: int = 100,
    ) -> None:
        self.folder, self.shape, self.scaling = folder, shape, scaling
        self.max_unreadable = max_unreadable
        self._environment: lmdb.Environment | None = None
        with self._reading() as txn:
            self.num = self._read_num(txn)
            self._require_rows(txn)
            self.scaled = self._read_scaled(txn, scaled)
            self._require_vae(txn)
        self._environment = None

    def __getstate__(self) -> dict[str, Any]:
        # A map of a file cannot be sent to a worker process, which opens its own.
        return {**self.__dict__, "_environment": None}

    def fingerprint(self) -> str:
        """A digest of the number of rows and of 32 of them."""
        digest = hashlib.sha256(repr((self.num, self.shape, self.scaled)).encode())
        with self._reading() as txn:
            # A few rows: ranks compare this at every start, and a data set may have a terabyte.
            for row in range(0, self.num, -(-self.num // 32)):
                for stored in self._row(txn, row):
                    digest.update(stored)
        return digest.hexdigest()

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, position: Position) -> Item:
        return first_readable(self.sample, position, len(self), self.max_unreadable)

    def all_prompts(self) -> Iterator[str]:
        """The prompts of all samples, in their order; those that are no UTF-8 are left out."""
        with self._reading() as txn:
            for row in range(self.num):
                text = txn.get(prompt_key(row))
                with suppress(UnicodeDecodeError):
                    yield (text or b"").decode("utf-8")

    def sample(self, position: Position, row: int) -> Item:
        """One row, its latents float32 and scaled, at a place of the run; raises UnreadableItem."""
        with self._reading() as txn:
            stored, prompt = read_row(self.folder, txn, row, self.num, self.shape)
        latents = torch.from_numpy(stored)
        latents = latents if self.scaled else self.scaling.apply(latents)
        return Item(prompt, position.index, latents=latents)

    def source(self, row: int) -> str:
        """How a sample is called where it is passed over."""
        return f"{self.folder}: row {row}"

    @contextmanager
    def _reading(self) -> "Iterator[lmdb.Transaction[bytes]]":
        """A transaction on this process's environment, opened when first needed."""
        if self._environment is None:
            self._environment = open_whole(self.folder)
        try:
            with self._environment.begin() as txn:
                yield txn
        except lmdb.Error as error:
            raise ValueError(f"{self.folder} is damaged: {error}") from error

    def _row(self, txn: "lmdb.Transaction[bytes]", row: int) -> tuple[bytes, bytes]:
        return stored_row(self.folder, txn, row, self.num, self.shape)

    def _read_num(self, txn: "lmdb.Transaction[bytes]") -> int:
        num, *stored = read_shape(self.folder, txn)
        if tuple(stored) != tuple(self.shape):
            raise ValueError(
                f"{self.folder} holds latents {stored}, the teacher's at the run's resolution are "
                f"{list(self.shape)}: they are of another VAE or another resolution"
            )
        return num

    def _require_rows(self, txn: "lmdb.Transaction[bytes]") -> None:
        """Cheap on any size: the first row, the last, and how many entries there are."""
        for row in (0, self.num - 1):
            self._row(txn, row)
        entries, needed = txn.stat()["entries"], 2 * self.num + 1
        if entries < needed:
            raise ValueError(
                f"{self.folder} has {entries} entries, {self.num} rows of latents and prompts and "
                f"their shape are {needed}: rows are missing"
            )

    def _read_scaled(self, txn: "lmdb.Transaction[bytes]", asked: bool | None) -> bool:
        said = txn.get(SCALED_KEY)
        if said is None and asked is None:
            self._warn_if_unscaled(txn)
            return True
        if said is None:
            return asked is True
        stored = said == b"1"
        if asked is not None and asked != stored:
            raise ValueError(
                f"{self.folder} says that its latents are {'' if stored else 'not '}scaled, which "
                "contradicts the configuration; leave that to the LMDB"
            )
        return stored

    def _warn_if_unscaled(self, txn: "lmdb.Transaction[bytes]") -> None:
        """A VAE's scaling factor brings its latents to about unit deviation."""
        ends = [np.frombuffer(self._row(txn, row)[0], DTYPE) for row in (0, self.num - 1)]
        deviation = max(float(np.concatenate(ends).astype(np.float32).std()), 1e-6)
        if abs(math.log(deviation)) > abs(math.log(deviation * self.scaling.factor)):
            logger.warning(
                "%s does not say whether its latents are scaled, and is read as if they were; but "
                "their standard deviation is %.2f, with the teacher's scaling factor %g it would "
                "be %.2f: if they are not, say so in the configuration (latents_scaled)",
                self.folder,
                deviation,
                self.scaling.factor,
                deviation * self.scaling.factor,
            )

    def _require_vae(self, txn: "lmdb.Transaction[bytes]") -> None:
        """Another scaling is another VAE; other weights may be the same VAE in another type."""
        for key, name, here in (
            (FACTOR_KEY, "scaling factor", self.scaling.factor),
            (SHIFT_KEY, "shift", self.scaling.shift),
        ):
            said = txn.get(key)
            if said is not None and not np.isclose(float(said), here, rtol=1e-6, atol=1e-9):
                raise ValueError(
                    f"{self.folder} holds latents of a VAE with {name} {float(said)}, the "
                    f"teacher's has {here}: they are of another VAE"
                )
        said, here_sha256 = txn.get(VAE_KEY), self.scaling.vae_sha256
        if said and here_sha256 and said.decode() != here_sha256:
            logger.warning(
                "%s holds latents of a VAE whose weights have the sha256 %s, the teacher's have "
                "%s: right only if it is the same VAE, saved in another way",
                self.folder,
                said.decode()[:12],
                here_sha256[:12],
            )


def read_shape(folder: Path, txn: "lmdb.Transaction[bytes]") -> list[int]:
    """latents_shape, N C h w; raises ValueError when it is missing or says something else."""
    text = txn.get(SHAPE_KEY)
    if text is None and txn.get(CONVERSION_KEY) is not None:
        raise ValueError(
            f"{folder} is not finished: go on with the `python -m senseflow.data.convert` that "
            "began it"
        )
    if text is None:
        raise ValueError(f"{folder} has no latents_shape: it is not an LMDB of latents")
    try:
        shape = [int(number) for number in text.decode().split()]
    except ValueError:
        shape = []
    if len(shape) != 4 or min(shape) < 1:
        raise ValueError(
            f"{folder}: latents_shape is {text!r}, expected four numbers of at least 1: N C h w"
        )
    return shape


def stored_row(
    folder: Path, txn: "lmdb.Transaction[bytes]", row: int, num: int, shape: tuple[int, ...]
) -> tuple[bytes, bytes]:
    """The bytes of a row's latents (C, h, w) and of its prompt, row 0 to num - 1.

    Raises ValueError for a row that is missing or of another length.
    """
    found = []
    for key in (latents_key(row), prompt_key(row)):
        value = txn.get(key)
        if value is None:
            raise ValueError(
                f"{folder} has no {key.decode()}, one of the {num} rows that its latents_shape "
                "promises"
            )
        found.append(value)
    length = int(np.prod(shape)) * DTYPE.itemsize
    if len(found[0]) != length:
        raise ValueError(
            f"{folder}: {latents_key(row).decode()} has {len(found[0])} bytes, float16 latents "
            f"{list(shape)} have {length}"
        )
    return found[0], found[1]


def read_row(
    folder: Path, txn: "lmdb.Transaction[bytes]", row: int, num: int, shape: tuple[int, ...]
) -> tuple[np.ndarray, str]:
    """A row's latents (C, h, w) float32, as they are stored, and its prompt.

    Raises ValueError as `stored_row`, and UnreadableItem for numbers that are not finite and a
    prompt that is not UTF-8.
    """
    data, text = stored_row(folder, txn, row, num, shape)
    latents: np.ndarray = np.frombuffer(data, DTYPE).astype(np.float32).reshape(shape)
    if not np.isfinite(latents).all():
        raise UnreadableItem(f"{folder}: row {row}", "latents that are not finite")
    try:
        return latents, text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UnreadableItem(f"{folder}: row {row}", f"prompt: {error}") from error


def open_whole(folder: Path) -> lmdb.Environment:
    """A read-only environment, one per process; raises ValueError unless it is a whole LMDB.

    LMDB maps its file into memory and would end the process with SIGBUS at the first page past the
    end of a file that is cut short; so the size is compared before any page is read.
    """
    file = folder / DATA
    if not file.is_file():
        raise ValueError(f"{folder} is not an LMDB: it has no {DATA}")
    key = str(file.resolve())
    environment = _environments.get(key)
    if environment is not None:
        return environment
    try:
        # No lock: a data set may lie on a disk that cannot be written. No readahead: rows are
        # read in the order of a permutation.
        environment = lmdb.open(
            str(folder), readonly=True, create=False, lock=False, readahead=False
        )
    except lmdb.Error as error:
        raise ValueError(f"{file} is not an LMDB or cannot be read: {error}") from error
    size, needed = file.stat().st_size, whole_size(environment)
    if size < needed:
        environment.close()
        raise ValueError(
            f"{file} is cut short: it has {size} bytes of {needed}; copy or download it again"
        )
    _environments[key] = environment
    return environment


def whole_size(environment: lmdb.Environment) -> int:
    """The bytes that the data file of an environment has when it is whole."""
    return int((environment.info()["last_pgno"] + 1) * environment.stat()["psize"])
