"""Which files of a folder are images, by their names; none is opened."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

# In the order of preference where one sample has several.
IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".webp", ".jfif", ".jpe", ".avif", ".tif", ".tiff", ".bmp", ".gif",
    ".jp2", ".heic", ".heif", ".jxl",
)  # fmt: skip
CHECKED = ".check"  # how the folders of `senseflow.data.check` end, whose pictures are no data
HEIF = (".heic", ".heif")


def why_unread(suffix: str) -> str | None:
    """Why no image of this kind can be opened here; None where Pillow knows the kind."""
    if suffix.lower() in Image.registered_extensions() or suffix.lower() not in IMAGE_SUFFIXES:
        return None
    way = "pip install pillow-heif" if suffix.lower() in HEIF else "write it as .png or .jpg"
    return f"a {suffix.lower()} image, which Pillow does not read here ({way})"


def files_below(folder: Path, others: Counter[str]) -> Iterator[str]:
    """The files in a folder and below it, as relative POSIX paths, in any order.

    Counts in `others`, and passes over, what is hidden, folders that are links or that
    `senseflow.data.check` has written, and what is no file: a pipe or a device, whose reader would
    wait for ever, and a link to nothing.
    Raises OSError for a folder that cannot be read.
    """
    waiting = [""]
    while waiting:
        below = waiting.pop()
        with os.scandir(folder / below) as entries:  # knows the kind without asking for each file
            for entry in entries:
                if entry.name.startswith("."):
                    others["hidden"] += 1
                elif entry.is_file():
                    yield below + entry.name
                elif not entry.is_dir():
                    others["pipes, devices and broken links"] += 1
                elif entry.is_symlink():
                    others["linked folders"] += 1
                elif entry.name.endswith(CHECKED):
                    others["folders of a check"] += 1
                else:
                    waiting.append(f"{below}{entry.name}/")
