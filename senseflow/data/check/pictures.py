"""Pictures of a check: histograms of its numbers, and a sheet of what is suspicious."""

import io
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image, ImageDraw

from senseflow.data.check.findings import Finding, share
from senseflow.data.check.images import MOST_CUT, cut_away, enlargement
from senseflow.data.check.looking import Look, Seen
from senseflow.data.decode import UNREADABLE, fit, read_rgb
from senseflow.data.image_lists import one_line

INK, MUTED, BLUE, RED = "#22303c", "#8a97a3", "#1f6fb2", "#c8402f"
TILE, GAP, TEXT, LABEL = 128, 6, 14, 22  # pixels
COLUMNS = 8
BINS = 40
SHOWN = ("duplicates", "near duplicates", "small", "cut", "flat")


# ------------------------------------------------------------------------------------ histograms


def draw_images(
    seen: Sequence[Seen], resolution: tuple[int, int], lengths: list[int], limit: int, unit: str
) -> Image.Image:
    """Sizes, enlargement, crop and captions. lengths: of the captions in `unit`, of which `limit`
    are read (0: no limit)."""
    looks = [found for found in seen if isinstance(found, Look)]
    figure = Figure(figsize=(10, 6.4), dpi=100, layout="constrained")
    size, scale, cut, caption = figure.subplots(2, 2).flat
    _sizes(size, looks, resolution)
    factors = np.array([enlargement(look, resolution) for look in looks])
    _histogram(scale, factors, "resized by a factor of", 1, "enlarged, which is blur")
    cuts = np.array([cut_away(look, resolution) for look in looks])
    _histogram(cut, cuts, "share of the picture that the crop takes", MOST_CUT, "lose much", 1)
    words = np.array(lengths)
    _histogram(caption, words, f"{unit} per caption", limit or None, "are not read to the end")
    return _rendered(figure)


def draw_latents(deviations: list[float], words: list[int]) -> Image.Image:
    """The standard deviation of each row, and the words of each caption."""
    figure = Figure(figsize=(10, 3.4), dpi=100, layout="constrained")
    rows, caption = figure.subplots(1, 2)
    _histogram(rows, np.array(deviations), "standard deviation of a row's latents", None, "")
    _histogram(caption, np.array(words), "words per caption", None, "")
    rows.set_ylabel("rows")
    caption.set_ylabel("rows")
    return _rendered(figure)


def draw_prompts(words: list[int]) -> Image.Image:
    """The words of each prompt."""
    figure = Figure(figsize=(5, 3.4), dpi=100, layout="constrained")
    axes = figure.subplots()
    _histogram(axes, np.array(words), "words per prompt", None, "")
    axes.set_ylabel("prompts")
    return _rendered(figure)


def _sizes(axes: Axes, looks: list[Look], resolution: tuple[int, int]) -> None:
    widths, heights = ([look.width for look in looks], [look.height for look in looks])
    axes.scatter(widths, heights, s=9, alpha=0.35, color=BLUE, linewidths=0)
    height, width = resolution
    axes.axvline(width, color=RED, linestyle="--", linewidth=1)
    axes.axhline(height, color=RED, linestyle="--", linewidth=1)
    axes.set(xlabel="width, pixels", ylabel="height, pixels")
    axes.set_title(f"the resolution, {width}x{height}", color=RED, fontsize=9, loc="left")
    _finish(axes, 1.08 * max([width, *widths]), 1.08 * max([height, *heights]))


def _histogram(
    axes: Axes,
    values: np.ndarray,
    label: str,
    limit: float | None,
    beyond: str,
    most: float | None = None,
) -> None:
    """Counts of values from 0 to `most` (None: the largest), and how many are above the limit."""
    most = most or 1.04 * max([*values, limit or 0, 1e-6])
    if values.dtype.kind == "i":  # a bar for each whole number, or for several
        step = -(-int(most + 1) // BINS)
        edges = np.arange(0, max(most, 9) + 2 * step, step) - 0.5
        axes.hist(values, bins=edges.tolist(), color=BLUE)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        most = float(edges[-1])
    else:
        axes.hist(values, bins=BINS, range=(0, most), color=BLUE)
    if limit is not None:
        axes.axvline(limit, color=RED, linestyle="--", linewidth=1)
        said = f"{share(int((values > limit).sum()), len(values))} {beyond}"
        axes.set_title(said, color=RED, fontsize=9, loc="left")
    axes.set(xlabel=label, ylabel="images")
    _finish(axes, most, max(1.0, axes.get_ylim()[1]))


def _finish(axes: Axes, right: float, top: float) -> None:
    """Both axes begin at zero, so that lengths can be compared by eye."""
    axes.set_xlim(0, right)
    axes.set_ylim(0, top)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=9)


def _rendered(figure: Figure) -> Image.Image:
    with io.BytesIO() as stream:
        figure.savefig(stream, format="png")
        return Image.open(stream).convert("P", palette=Image.Palette.ADAPTIVE, colors=255)


# ----------------------------------------------------------------------------------------- sheet


@dataclass(frozen=True)
class Tile:
    """One picture of the sheet. cropped: as training sees it; else whole, with the crop's frame."""

    path: Path
    text: str
    cropped: bool = False


def draw_sheet(
    paths: list[Path],
    prompts: list[str],
    seen: Sequence[Seen],
    findings: list[Finding],
    resolution: tuple[int, int],
) -> Image.Image:
    """A row of what training sees, then one for each kind of suspicion, the worst first."""
    readable = [i for i, found in enumerate(seen) if isinstance(found, Look)]
    chosen = readable[:: max(1, len(readable) // COLUMNS)][:COLUMNS]
    rows = {"as training sees them": [Tile(paths[i], prompts[i], True) for i in chosen]}
    for finding in findings:
        if finding.name in SHOWN:
            rows[f"{finding.name}: {finding.words}"] = _tiles(finding, paths)
    height = LABEL + TILE + TEXT + GAP
    sheet = Image.new("RGB", (COLUMNS * (TILE + GAP) + GAP, len(rows) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for y, (label, tiles) in enumerate(rows.items()):
        pen.text((GAP, y * height + 5), _cut_to(label, sheet.width - 2 * GAP, pen), fill=INK)
        for x, tile in enumerate(tiles):
            left, top = GAP + x * (TILE + GAP), y * height + LABEL
            sheet.paste(_picture(tile, resolution), (left, top))
            pen.text((left, top + TILE), _cut_to(tile.text, TILE, pen), fill=INK)
    return sheet


def _tiles(finding: Finding, paths: list[Path]) -> list[Tile]:
    """The worst; of groups the first two of each."""
    tiles = []
    for number, place in enumerate(finding.places[:COLUMNS]):
        if isinstance(place, list):
            tiles += [Tile(paths[i], f"{number + 1}: {paths[i].name}") for i in place[:2]]
        else:
            said = f"{finding.reasons[number]} " if finding.reasons else ""
            tiles.append(Tile(paths[place], said + paths[place].name))
    return tiles[:COLUMNS]


def _picture(tile: Tile, resolution: tuple[int, int]) -> Image.Image:
    """A square tile; one whose file has gone meanwhile is empty."""
    square = Image.new("RGB", (TILE, TILE), "#e6edf4")
    try:
        picture = read_rgb(tile.path)
    except UNREADABLE:
        return square
    frame = None
    if tile.cropped:
        # no larger than it is drawn: a run's resolution may be thousands of pixels
        small = min(1.0, TILE / max(resolution))
        height, width = (max(1, round(small * side)) for side in resolution)
        picture = fit(picture, (height, width), (0.5, 0.5))
    else:
        frame = _frame(picture.size, resolution)
    scale = TILE / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    left, top = (TILE - size[0]) // 2, (TILE - size[1]) // 2
    square.paste(picture.resize(size, Image.Resampling.BICUBIC), (left, top))
    pen = ImageDraw.Draw(square)
    # its own edge, which a white picture would not have on white
    pen.rectangle([left, top, left + size[0] - 1, top + size[1] - 1], outline=MUTED)
    if frame:
        x0, y0, x1, y1 = (round(value * scale) for value in frame)
        pen.rectangle([left + x0, top + y0, left + x1 - 1, top + y1 - 1], outline=RED)
    return square


def _frame(
    size: tuple[int, int], resolution: tuple[int, int]
) -> tuple[float, float, float, float] | None:
    """Left, top, right, bottom of what the centre crop keeps; None when it keeps nearly all."""
    width, height = size
    scale = max(resolution[0] / height, resolution[1] / width)
    kept = resolution[1] / scale, resolution[0] / scale
    if kept[0] * kept[1] > 0.95 * width * height:
        return None
    left, top = (width - kept[0]) / 2, (height - kept[1]) / 2
    return left, top, left + kept[0], top + kept[1]


def _cut_to(text: str, width: int, pen: ImageDraw.ImageDraw) -> str:
    """As much of a text as fits into so many pixels."""
    text = one_line(text)[:width]  # a letter takes a pixel at least; captions may be very long
    lengths = range(len(text) + 1)
    return text[: bisect_right(lengths, width, key=lambda n: ceil(pen.textlength(text[:n]))) - 1]
