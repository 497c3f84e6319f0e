"""What reading one image takes: CPU milliseconds of a JPEG of 3000 x 2000, at 1024 px, on a thread.

    python -m benchmarks.images [JPEG]

Beside it Pillow's Lanczos filter on the same file, as images that are stored exactly are read, and
how far apart the two are in grey levels. Without a file: soft shapes and noise, at quality 92.
"""

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from senseflow.data.decode import read_rgb
from senseflow.data.json_images import fit_exactly, read_image

RESOLUTION, MIDDLE = (1024, 1024), (0.5, 0.5)
TIMES = 10


def photo(file: Path) -> None:
    """Write soft shapes and noise."""
    y, x = np.mgrid[:2000, :3000] / 100
    shapes = np.stack([np.sin(x) * np.cos(y), np.sin(x + y), np.cos(x * y / 9)], -1)
    noise = np.random.default_rng(0).normal(0, 6, shapes.shape)
    picture = Image.fromarray((127 + 90 * shapes + noise).clip(0, 255).astype(np.uint8))
    picture.save(file, quality=92)


def by_lanczos(file: Path) -> Tensor:
    """The file as one that is stored exactly would be read."""
    return fit_exactly(read_rgb(file), RESOLUTION, MIDDLE)


def compare(file: Path) -> None:
    """Print both times, taken in turn, and the difference."""
    torch.set_num_threads(1)
    reads = {
        "read": partial(read_image, file, RESOLUTION, MIDDLE),
        "lanczos": partial(by_lanczos, file),
    }
    images = {name: read() for name, read in reads.items()}
    seconds = dict.fromkeys(reads, 0.0)
    for _ in range(TIMES):
        for name, read in reads.items():
            began = time.process_time()
            read()
            seconds[name] += time.process_time() - began
    for name, total in seconds.items():
        print(f"{name}: {1e3 * total / TIMES:.0f} ms")
    apart = (images["read"] - images["lanczos"]).abs() * 127.5
    print(f"apart: {apart.mean():.2f} grey levels, {apart.max():.0f} at most")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("jpeg", metavar="JPEG", nargs="?", type=Path)
    given = parser.parse_args().jpeg
    with tempfile.TemporaryDirectory() as folder:
        if given is None:
            photo(Path(folder) / "photo.jpg")
        compare(given or Path(folder) / "photo.jpg")


if __name__ == "__main__":
    main()
