"""A real disk of a few MB, or one that cannot be written, for as long as a test needs it."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def _mount(*words: str | Path) -> None:
    result = subprocess.run(["mount", *map(str, words)], capture_output=True, text=True)
    if result.returncode:
        pytest.skip(f"needs the right to mount: {result.stderr.strip()}")


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """`folder` on a tmpfs of this size, such as "1m"."""
    folder.mkdir()
    _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@contextmanager
def read_only(folder: Path) -> Iterator[Path]:
    """`folder` bound to itself without the right to write, which root has otherwise."""
    folder.mkdir()
    _mount("--bind", folder, folder)
    try:
        _mount("-o", "remount,bind,ro", folder)
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def grow(folder: Path, size: str) -> None:
    """Make room on a small disk."""
    _mount("-o", f"remount,size={size}", folder)


def fill(folder: Path, free: int = 0) -> None:
    """Leave so many bytes free."""
    disk = os.statvfs(folder)
    (folder / "fill").write_bytes(b"0" * (disk.f_bavail * disk.f_bsize - free))
