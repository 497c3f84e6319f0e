"""Small files that are whole or not there; needs no torch."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"  # how the names of unfinished files end, and those of folders begin


def write_whole(file: Path, text: str) -> None:
    """Replace a small file so that a reader sees the old or the new one, never half."""
    partial = file.with_name(f"{file.name}.{os.getpid()}{PARTIAL}")  # each process its own
    try:
        with partial.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """While other processes on this machine that ask for the same wait their turn."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
