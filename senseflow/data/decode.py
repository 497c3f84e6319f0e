"""Image files as upright RGB pictures of one size; needs no torch.

An animation is its first frame, CMYK and palettes become RGB without their colour profile.
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def read_rgb(path: Path) -> Image.Image:
    """The picture in a file; raises one of UNREADABLE when it is missing, damaged or none."""
    with Image.open(path) as opened:
        return to_rgb(opened)


def to_rgb(picture: Image.Image) -> Image.Image:
    """Decode wholly, upright, in RGB; transparency becomes white.

    16-bit grey is scaled to 8 bits (Pillow would clip it to white). Raises ValueError for pixels
    whose range no one can know: 32-bit integers and floats.
    """
    picture = ImageOps.exif_transpose(picture)
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
    """Resize so that the picture covers height x width, then crop at `where` of the rest."""
    return ImageOps.fit(
        picture,
        (resolution[1], resolution[0]),
        method=Image.Resampling.LANCZOS,
        centering=(where[1], where[0]),
    )
