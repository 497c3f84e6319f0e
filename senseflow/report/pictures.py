"""The pictures of the report: strips through time, and samples side by side.

A picture is made no larger than a bound and written into the HTML itself.
"""

import base64
import io
import warnings
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from senseflow.report.pairs import Pairs, Samples
from senseflow.report.run_folder import RunFolder

STRIP_SIDE = 1400  # pixels at most: eight columns of 175
SAMPLE_SIDE = 512
WIDE_STRIP = 900  # pixels above which each strip has the page's whole width
SMALL = 160  # pixels below which a picture is shown enlarged, without smoothing
PNG_PIXELS = 400_000  # of a strip of the embedded teachers; larger pictures are photographs
PNG_BYTES = 60_000  # up to this size lossless, above it the smaller of PNG and JPEG
JPEG_QUALITY = 85


@dataclass(frozen=True)
class Embedded:
    """A picture as a data URI, and its size in pixels."""

    uri: str
    width: int
    height: int

    @property
    def small(self) -> bool:
        """Whether it is enlarged."""
        return max(self.width, self.height) < SMALL


Shown = Embedded | str  # a picture, or why there is none


@dataclass(frozen=True)
class Pictures:
    """What the page shows of the strips and of the samples, and how many there were."""

    strips: list[tuple[int, Shown]]
    num_strips: int
    columns: list[Samples]
    samples: list[tuple[str, int, list[Shown | None]]]  # prompt, seed, one per column
    num_samples: int
    notices: list[str]

    @property
    def wide(self) -> bool:
        """Whether a strip needs the page's whole width."""
        return any(isinstance(s, Embedded) and s.width > WIDE_STRIP for _, s in self.strips)

    @property
    def cell_width(self) -> int:
        """Pixels of one sample."""
        cells = [s for _, _, row in self.samples for s in row if isinstance(s, Embedded)]
        return 110 if all(shown.small for shown in cells) else 220

    @property
    def card_width(self) -> int:
        """Pixels of one prompt's samples: up to four stand side by side."""
        return max(300, 30 + (self.cell_width + 10) * min(4, len(self.columns)))

    @property
    def missing(self) -> list[str]:
        """Why pictures cannot be shown, a line each."""
        cells = [shown for _, shown in self.strips]
        cells += [shown for _, _, row in self.samples for shown in row if shown is not None]
        return [shown for shown in cells if isinstance(shown, str)]


def collect(run: RunFolder, pairs: Pairs | None, num_strips: int, num_samples: int) -> Pictures:
    """Embed at most so many strips and prompts, evenly spaced."""
    strips = [run.strips[k] for k in evenly(len(run.strips), num_strips)]
    columns, keys = (pairs.columns, pairs.keys) if pairs else ([], [])
    rows = []
    for key in (keys[k] for k in evenly(len(keys), num_samples)):
        files = [column.files.get(key) for column in columns]
        rows.append((*key, [_shown(file, SAMPLE_SIDE) if file else None for file in files]))
    return Pictures(
        strips=[(iteration, _shown(file, STRIP_SIDE)) for iteration, file in strips],
        num_strips=len(run.strips),
        columns=columns,
        samples=rows,
        num_samples=len(keys),
        notices=pairs.notices if pairs else [],
    )


def evenly(num: int, most: int) -> list[int]:
    """At most `most` of the places 0 to num - 1, evenly spaced, the first and the last among them.

    One alone is the last.
    """
    if num <= most:
        return list(range(num))
    if most == 1:
        return [num - 1]
    return [round(k * (num - 1) / (most - 1)) for k in range(most)]


def _shown(file: Path, side: int) -> Shown:
    """A picture no wider or higher than `side` pixels, or why it cannot be shown."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(file) as opened:
                picture = opened.convert("RGB")
    except UnidentifiedImageError:
        return f"{file.name} is not a picture"
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return f"{file.name} cannot be shown: {error}"
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    kind, data = _encoded(picture)
    uri = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return Embedded(uri, picture.width, picture.height)


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
