"""Image files as upright RGB pictures of one size; needs no torch.

An animation is its first frame, CMYK and palettes become RGB without their colour profile.
"""

import errno
import math
import os
import stat
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from senseflow.data.image_files import why_unread

try:  # a phone's .heic, for who has this package
    from pillow_heif import register_heif_opener
except ImportError:
    pass
else:
    register_heif_opener()

JPEG = ("JPEG", "MPO")  # as Pillow names them; the latter is a phone's, of several pictures
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def why_not(error: Exception) -> str:
    """What one of UNREADABLE says in a line, but for what names a path that is too long whole."""
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return str(error.strerror)
    return " ".join(str(error).split()) or type(error).__name__


def read_rgb(path: Path) -> Image.Image:
    """The picture in a file; raises one of UNREADABLE when it is missing, damaged or none."""
    with open_image(path) as opened:
        return to_rgb(opened)


def open_image(path: Path) -> Image.Image:
    """A file whose pixels are not read yet; raises one of UNREADABLE."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        # Whoever opens a pipe waits until someone writes to it; some devices never end.
        raise OSError(f"a pipe, a device or a folder: {path}")
    try:
        return Image.open(path)
    except UnidentifiedImageError as error:
        if why := why_unread(path.suffix):
            raise OSError(f"{why}: {path}") from error
        raise


def to_rgb(picture: Image.Image) -> Image.Image:
    """Decode wholly, upright, in RGB; transparency becomes white.

    16-bit grey is scaled to 8 bits (Pillow would clip it to white). Raises ValueError for pixels
    whose range no one can know: 32-bit integers and floats.
    """
    ImageOps.exif_transpose(picture, in_place=True)
    if picture.mode.startswith("I;16"):
        # 257 x 255 is 65535: black and white stay what they are.
        grey = np.asarray(picture, dtype=np.float32) / 257
        picture = Image.fromarray(grey.round().astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {picture.mode} have no known range")
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        paper = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(paper, picture)
    return picture.convert("RGB")


def fit(
    picture: Image.Image, resolution: tuple[int, int], where: tuple[float, float]
) -> Image.Image:
    """Resize so that the picture covers height x width, then crop at `where` of the rest; by
    Pillow's Lanczos filter, which widens with the reduction."""
    return ImageOps.fit(
        picture,
        (resolution[1], resolution[0]),
        method=Image.Resampling.LANCZOS,
        centering=(where[1], where[0]),
    )


def box_of(
    size: tuple[int, int], resolution: tuple[int, int], where: tuple[float, float]
) -> tuple[slice, slice]:
    """The rows and columns of a picture that `fit` brings to height x width, in whole pixels.

    size: width and height. Halves go outwards, so that what is in the middle stays there.
    """
    sides = (size[1], size[0])
    scale = min(side / wanted for side, wanted in zip(sides, resolution, strict=True))
    starts = [(s - w * scale) * at for s, w, at in zip(sides, resolution, where, strict=True)]
    rows, columns = (
        slice(max(0, math.ceil(start - 0.5)), math.floor(start + wanted * scale + 0.5))
        for start, wanted in zip(starts, resolution, strict=True)
    )
    return rows, columns
