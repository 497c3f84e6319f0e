"""One image as the check sees it: decoded as training decodes it, measured, hashed.

The perceptual hash is the usual DCT hash: the picture in grey at 32 x 32, its cosine transform, and
of the 8 x 8 lowest frequencies one bit each, whether it is above their median. A thumbnail of 8 x 8
colours goes with it, because the hash knows neither colours nor contrast.
"""

import hashlib
import math
import os
import signal
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from senseflow.data.decode import UNREADABLE, open_image, to_rgb, why_not

SIDE = 32  # of the grey picture that is transformed
LOWEST = 8  # frequencies each way, and the side of the thumbnail
CHUNK = 16  # images per message to a worker
DIGEST = 16  # bytes, of the decoded pixels
TURNED = 0x0112  # EXIF's orientation; 1 is upright


@dataclass(frozen=True)
class Look:
    """What is known of an image that can be read."""

    width: int  # upright
    height: int
    mode: str  # as it is stored
    num_frames: int
    turned: bool  # by EXIF
    num_bytes: int  # of the file
    spread: float  # standard deviation of its grey levels, 0 to 255
    digest: bytes  # of size and decoded pixels
    hash: int  # 64 bits
    thumbnail: bytes  # 8 x 8 RGB


Seen = Look | str  # or why it cannot be read


def look_at(path: str) -> Seen:
    """Decode one file wholly and measure it."""
    try:
        with warnings.catch_warnings(), open_image(Path(path)) as opened:
            warnings.simplefilter("ignore")  # of files that are odd and still readable
            mode, turned = opened.mode, opened.getexif().get(TURNED, 1) != 1
            num_frames = int(getattr(opened, "n_frames", 1))  # of some formats
            picture = to_rgb(opened)
    except UNREADABLE as error:
        return why_not(error)
    small = picture.resize((SIDE, SIDE), Image.Resampling.BOX)
    grey = np.asarray(small.convert("L"), np.float64)  # (32, 32)
    return Look(
        *picture.size,
        mode,
        num_frames,
        turned,
        os.path.getsize(path),
        float(grey.std()),
        hashlib.blake2b(
            repr(picture.size).encode() + picture.tobytes(), digest_size=DIGEST
        ).digest(),
        perceptual_hash(grey),
        small.resize((LOWEST, LOWEST), Image.Resampling.BOX).tobytes(),
    )


def perceptual_hash(grey: np.ndarray) -> int:
    """64 bits of grey levels (32, 32)."""
    frequencies = np.arange(LOWEST)[:, None] * (2 * np.arange(SIDE) + 1)
    cosines = np.cos(math.pi / (2 * SIDE) * frequencies)  # (8, 32), the DCT-II's lowest rows
    lowest = (cosines @ grey @ cosines.T).ravel().round(6)
    return int.from_bytes(np.packbits(lowest > np.median(lowest)).tobytes(), "big")


def look_at_all(paths: list[Path], num_workers: int) -> list[Seen]:
    """What each file holds, in their order; a file listed twice is read once.

    num_workers: processes, as far as there is work for them; 1: this one. Raises ValueError when
    one is killed.
    """
    distinct = list(dict.fromkeys(map(str, paths)))
    looks = _looks(distinct, min(num_workers, -(-len(distinct) // CHUNK)))
    bar = tqdm(looks, total=len(distinct), unit="image", smoothing=0.05, mininterval=0.5)
    seen = dict(zip(distinct, bar, strict=True))
    return [seen[str(path)] for path in paths]


def _looks(paths: list[str], num_workers: int) -> Iterator[Seen]:
    if num_workers == 1:
        yield from map(look_at, paths)
        return
    context = get_context("spawn")  # a copy of this process would share its locks and threads
    pool = ProcessPoolExecutor(num_workers, context, initializer=_leave_ctrl_c_to_parent)
    try:
        yield from pool.map(look_at, paths, chunksize=CHUNK)
    except BrokenProcessPool as error:
        raise ValueError(
            f"a worker was killed (out of memory?): fewer with --workers, now {num_workers}"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _leave_ctrl_c_to_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
