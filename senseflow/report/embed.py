"""Pictures inside a page: read, made no larger than a bound, and written into the HTML itself."""

import base64
import io
import warnings
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

PNG_PIXELS = 400_000  # of a strip of the embedded teachers; larger pictures are photographs
PNG_BYTES = 60_000  # up to this size lossless, above it the smaller of PNG and JPEG
JPEG_QUALITY = 85


@dataclass(frozen=True)
class Embedded:
    """A picture as a data URI, and its size in pixels."""

    uri: str
    width: int
    height: int


def embed(file: Path, side: int) -> Embedded:
    """A picture no wider or higher than `side` pixels; raises ValueError for one that is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(file) as opened:
                picture = opened.convert("RGB")
    except UnidentifiedImageError as error:
        raise ValueError(f"{file.name} is not a picture") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file.name} cannot be shown: {error}") from error
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    kind, data = _encoded(picture)
    uri = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return Embedded(uri, picture.width, picture.height)


def evenly(num: int, most: int) -> list[int]:
    """At most `most` of the places 0 to num - 1, evenly spaced, the first and the last among them.

    One alone is the last.
    """
    if num <= most:
        return list(range(num))
    if most == 1:
        return [num - 1]
    return [round(k * (num - 1) / (most - 1)) for k in range(most)]


def _encoded(picture: Image.Image) -> tuple[str, bytes]:
    """The kind and the bytes of its file."""
    lossless, lossy = io.BytesIO(), io.BytesIO()
    if picture.width * picture.height <= PNG_PIXELS:
        picture.save(lossless, "PNG")
        if lossless.tell() <= PNG_BYTES:
            return "png", lossless.getvalue()
    picture.save(lossy, "JPEG", quality=JPEG_QUALITY, optimize=True)
    if 0 < lossless.tell() < lossy.tell():
        return "png", lossless.getvalue()
    return "jpeg", lossy.getvalue()
