"""Small files that are whole or not there; needs no torch."""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from senseflow.common.weights_files import fault_of, size_in_words

PARTIAL = ".partial"  # how the names of unfinished files end, and those of folders begin


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """While a file is written: an OSError has its name, which a full disk does not say."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(file)
        raise


def write_whole(file: Path, text: str) -> None:
    """Replace a small file so that a reader sees the old or the new one, never half.

    A device or pipe, such as /dev/stdout, is written to and stays what it is.
    """
    if file.exists() and not file.is_file():
        with naming(file):
            file.write_text(text, encoding="utf-8")
        return
    partial = file.with_name(f"{file.name}.{os.getpid()}{PARTIAL}")  # each process its own
    try:
        with naming(file):
            with partial.open("w", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object; a missing or broken file is a ValueError that names it."""
    if not file.is_file():
        raise ValueError(f"{file} not found")
    try:
        tree = parse_json(file.read_bytes(), str(file))
    except ValueError as error:
        if fault := fault_of(file):
            raise ValueError(f"{file} {fault}") from error
        raise
    if not isinstance(tree, dict):
        raise ValueError(f"{file} holds no JSON object")
    return tree


def parse_json(text: str | bytes, where: str) -> Any:
    """What a text says in JSON, or the bytes of one in UTF-8, -16 or -32, with a byte order mark or
    without; raises ValueError, beginning with `where`, when it is none."""
    try:
        return json.loads(text)
    except RecursionError as error:  # brackets in brackets, thousands deep
        raise ValueError(f"{where} is not valid JSON: it is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from error


def sha256_of(file: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def require_writable(flag: str, folder: Path) -> None:
    """Raise ValueError, before any work, when nothing can be written to a folder that is there or
    is to be made; nothing is left behind.

    flag: what the folder was given as.
    """
    there = require_folder(flag, folder)
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise ValueError(
            f"{flag} {folder} cannot be written: {error.strerror}; name another"
        ) from error


def require_room(flag: str, folder: Path, num_bytes: int) -> None:
    """Raise ValueError where a folder's disk has less room than is to be written there."""
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise ValueError(
            f"{flag} {folder}: {size_in_words(num_bytes)} are to be written and "
            f"{size_in_words(free)} are free there"
        )


def require_folder(flag: str, folder: Path) -> Path:
    """What of a folder is there, it or a parent; raises ValueError where that is a file."""
    try:
        there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    except OSError as error:  # a name that is too long
        raise ValueError(f"{flag} {str(folder)[:100]}: {error.strerror}") from error
    if not there.is_dir():
        under = "" if there == folder else f" is under {there}, which"
        raise ValueError(f"{flag} {folder}{under} is a file: name a folder")
    return there


def require_own(flag: str, folder: Path, mark: str) -> None:
    """Raise ValueError for a folder with files in it that does not have `mark`, the file by which
    it would be one that the same command has left: nothing is mixed into what is not ours.

    flag: what the folder was given as.
    """
    if not folder.is_dir() or (folder / mark).exists():
        return
    names = (name for name in sorted(os.listdir(folder)) if not name.endswith(PARTIAL))
    first = next((name for name in names if name[0] != "." and name != "lost+found"), None)
    if first is not None:
        raise ValueError(
            f"{flag} {folder} has other files in it, such as {first}: name a new folder"
        )


@contextmanager
def alone_in(folder: Path, refusal: str | None = None) -> Iterator[None]:
    """While other processes on this machine that ask for the same wait their turn.

    refusal: in place of waiting, the words of a ValueError.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (fcntl.LOCK_NB if refusal else 0))
        except BlockingIOError as error:
            raise ValueError(refusal) from error
        yield
    finally:
        os.close(descriptor)


@contextmanager
def only_writer(output: Path) -> Iterator[None]:
    """While one process writes a folder or file that is not there yet; raises ValueError for a
    second one on this machine, whose unfinished files would have the same names.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    lock = output.with_name(f".{output.name}.lock")
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise ValueError(
            f"--output {output} is being written by another process: wait for it, or name another"
        ) from error
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


ROOT = Path(__file__).resolve().parents[2]  # where the prompts and configs of this repository lie
