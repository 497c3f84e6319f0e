"""Writes an LMDB of latents that may be interrupted at any moment and gone on with.

Rows and the place reached in the source are committed in one transaction, so that the file always
holds a whole number of chunks. latents_shape, which makes it an LMDB of latents, comes last, with
what is known of the VAE.
"""

import json
import os
import shutil
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lmdb

from senseflow.common.files import alone_in, parse_json, write_whole
from senseflow.data.image_lists import one_line
from senseflow.data.latents_lmdb import (
    CONVERSION_KEY,
    DATA,
    DTYPE,
    FACTOR_KEY,
    SCALED_KEY,
    SHAPE_KEY,
    SHIFT_KEY,
    VAE_KEY,
    LatentsScaling,
    latents_key,
    prompt_key,
    whole_size,
)

PROGRESS_KEY = b"conversion_progress"
PROMPTS_SHAPE_KEY = b"prompts_shape"  # DMD2 writes it and reads it nowhere
SKIPPED_LIST = "skipped.txt"
FIRST_MAP_SIZE = 2**26  # grows with the file

Entries = list[tuple[bytes, bytes]]


@dataclass(frozen=True)
class Chunk:
    """Consecutive samples of a source: rows to write, and those that could not be read."""

    latents: Any  # NumPy (n, C, h, w) float16
    prompts: list[str]
    skipped: list[tuple[str, str]]  # (source, reason)
    next: list[int]  # where the source goes on

    def __len__(self) -> int:
        return len(self.prompts) + len(self.skipped)


@dataclass(frozen=True)
class Progress:
    """How far a conversion is."""

    next: list[int] = field(default_factory=list)  # where the source goes on; empty: at its start
    shape: list[int] = field(default_factory=list)  # C h w
    num_rows: int = 0
    num_skipped: int = 0


class LatentsWriter:
    """One conversion's output.

    settings: all that the rows depend on; going on with others is refused.
    Raises ValueError for a folder that holds something else or that another process writes to,
    OSError when writing fails; what was committed before stays.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder, self.settings = folder, settings
        self._is_new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        self.progress, self.finished = Progress(), False
        self._stored: bytes | None = None  # the progress in the file
        with ExitStack() as stack:
            stack.enter_context(alone_in(folder, f"another process is writing to {folder}"))
            stack.callback(self._leave_nothing_begun)
            self.environment = _open(folder)
            stack.callback(self.environment.close)
            self._begin()
            self._ends = stack.pop_all()

    def __enter__(self) -> "LatentsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.close()

    def _leave_nothing_begun(self) -> None:
        """Before the first chunk is in there is nothing to go on with."""
        if self._stored is None or self.progress != Progress():
            return
        if not (self.folder / SKIPPED_LIST).exists():
            (self.folder / DATA).unlink(missing_ok=True)
            if self._is_new:
                with suppress(OSError):  # someone has put files there
                    self.folder.rmdir()

    def add(self, chunk: Chunk) -> None:
        """Commit a chunk and the place after it."""
        before, shape = self.progress, list(chunk.latents.shape[1:])
        if chunk.prompts and before.shape and shape != before.shape:
            raise ValueError(f"latents {shape} after latents {before.shape}: one LMDB holds one")
        entries: Entries = []
        for row, (latents, prompt) in enumerate(
            zip(chunk.latents, chunk.prompts, strict=True), start=before.num_rows
        ):
            entries.append((latents_key(row), latents.astype(DTYPE).tobytes()))
            entries.append((prompt_key(row), prompt.encode()))
        for number, skipped in enumerate(chunk.skipped, start=before.num_skipped):
            entries.append((_skipped_key(number), _json(skipped)))
        progress = Progress(
            next=chunk.next,
            shape=shape if chunk.prompts else before.shape,
            num_rows=before.num_rows + len(chunk.prompts),
            num_skipped=before.num_skipped + len(chunk.skipped),
        )
        self._commit(entries, progress)

    def finish(self, scaled: bool, scaling: LatentsScaling | None) -> None:
        """Mark it as whole, with what is known of the VAE. Raises ValueError without any row."""
        progress = self.progress
        if not progress.num_rows:
            raise ValueError(f"nothing to write to {self.folder}: not one sample could be read")
        shape = " ".join(map(str, [progress.num_rows, *progress.shape]))
        entries = [
            (SHAPE_KEY, shape.encode()),
            (PROMPTS_SHAPE_KEY, str(progress.num_rows).encode()),
            (SCALED_KEY, b"1" if scaled else b"0"),
        ]
        if scaling:
            entries.append((FACTOR_KEY, repr(scaling.factor).encode()))
            entries.append((SHIFT_KEY, repr(scaling.shift).encode()))
            entries.append((VAE_KEY, (scaling.vae_sha256 or "").encode()))
        self._commit(entries, progress)
        self.finished = True

    def skipped(self) -> list[tuple[str, str]]:
        """(source, reason) of every sample passed over so far."""
        with self.environment.begin() as txn:
            found = [txn.get(_skipped_key(i)) for i in range(self.progress.num_skipped)]
        pairs = (
            parse_json(f or b"", f"{self.folder}: its list of what was skipped") for f in found
        )
        return [(source, reason) for source, reason in pairs]

    def list_skipped(self, more: list[tuple[str, str]] | None = None) -> Path:
        """Write the list of what was passed over beside the data."""
        file = self.folder / SKIPPED_LIST
        rows = [*self.skipped(), *(more or [])]
        write_whole(file, "".join(f"{one_line(name)}\t{one_line(why)}\n" for name, why in rows))
        return file

    def _begin(self) -> None:
        """Anew, or from where it was."""
        with self.environment.begin() as txn:
            stored, begun = txn.get(PROGRESS_KEY), txn.get(CONVERSION_KEY)
            self.finished = txn.get(SHAPE_KEY) is not None
            num_entries = txn.stat()["entries"]
        if stored is not None:
            self.progress = Progress(**parse_json(stored, f"{self.folder}: its progress"))
            self._stored = stored
        if begun is not None:
            self._require_same(parse_json(begun, f"{self.folder}: its settings"))
        elif num_entries:
            raise ValueError(f"{self.folder} holds an LMDB that this program did not write")
        else:
            self._commit([(CONVERSION_KEY, _json(self.settings))], self.progress)

    def _commit(self, entries: Entries, progress: Progress) -> None:
        """All of it or nothing; the map grows when it is full."""
        stored = _json(asdict(progress))
        try:
            while not self._put([*entries, (PROGRESS_KEY, stored)]):
                self.environment.set_mapsize(2 * self.environment.info()["map_size"])
            file, size = self.folder / DATA, whole_size(self.environment)
            if file.stat().st_size < size:  # LMDB may leave out unused pages at the end, which
                os.truncate(file, size)  # would make a whole file look cut short
        except (lmdb.Error, OSError) as error:
            raise OSError(
                f"{self.folder / DATA} could not be written: {error}; {_room(self.folder)}. "
                f"{self.progress.num_rows} rows are stored; when there is room, the same command "
                "goes on from them"
            ) from error
        self.progress, self._stored = progress, stored

    def _put(self, entries: Entries) -> bool:
        """Whether the entries had room in the map."""
        try:
            with self.environment.begin(write=True) as txn:
                if txn.get(PROGRESS_KEY) != self._stored:
                    raise ValueError(f"another process is writing to {self.folder}")
                for key, value in entries:
                    txn.put(key, value)
        except lmdb.MapFullError:
            return False
        return True

    def _require_same(self, begun: dict[str, Any]) -> None:
        differences = [
            f"{key}: {begun.get(key)} -> {self.settings.get(key)}"
            for key in sorted({*begun, *self.settings})
            if begun.get(key) != self.settings.get(key)
        ]
        if differences:
            raise ValueError(
                f"{self.folder} was begun with other settings ({'; '.join(differences)}): name "
                "another folder, or the same settings to go on"
            )


def _open(folder: Path) -> lmdb.Environment:
    file = folder / DATA
    if file.exists() and not file.is_file():
        raise ValueError(f"{file} is no file")
    fresh = not file.exists()
    size = 0 if fresh else file.stat().st_size
    try:
        # Without LMDB's own lock file: it is written through a map of the file, which ends the
        # process with SIGBUS where the disk is full. `alone_in` is the lock.
        environment = lmdb.open(str(folder), map_size=max(FIRST_MAP_SIZE, 2 * size), lock=False)
    except lmdb.Error as error:
        if fresh:  # half of its first two pages, which no one could go on with
            file.unlink(missing_ok=True)
        raise ValueError(
            f"{file} is not an LMDB, or cannot be written: {error}; {_room(folder)}"
        ) from error
    size, needed = file.stat().st_size, whole_size(environment)
    if size < needed:  # reading it would be a SIGBUS
        environment.close()
        raise ValueError(f"{file} is cut short: it has {size} bytes of {needed}; begin it anew")
    return environment


def _room(folder: Path) -> str:
    """What LMDB does not say of a full disk, which is an input/output error to it."""
    return f"the disk has {shutil.disk_usage(folder).free / 2**20:.0f} MiB left"


def _skipped_key(number: int) -> bytes:
    return f"conversion_skipped_{number}".encode()


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()
