"""Curves as inline SVG: small, in the page's own colours, with values on hover and no script."""

import math
from dataclasses import dataclass
from html import escape

import numpy as np

from senseflow.report.signals import Curve, Floats

WIDTH, HEIGHT = 360, 156  # units of the drawing; it scales with its place in the page
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 8, 22
POINTS = 240  # drawn per curve; of more, each bucket's lowest and highest
BANDS = 60  # places to hover at
SMOOTHED_FROM = 24  # rows, from which a running median is drawn over the curve
DECADES = 50  # highest over lowest value from which the scale is logarithmic


@dataclass(frozen=True)
class Chart:
    """What is drawn in one picture; several curves share its scale and must have a legend."""

    title: str
    curves: dict[str, Curve]
    about: str = ""
    lines: tuple[tuple[float, str], ...] = ()  # levels to compare with, and their names
    marks: tuple[int, ...] = ()  # iterations at which the run was resumed
    around_zero: bool = False
    unit: str = ""


@dataclass(frozen=True)
class Scale:
    """From values to the drawing's units."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Where a value lies on the page, in SVG units; the ends for those beyond them."""
        low, high = self._of(self.low), self._of(self.high)
        share = (self._of(value) - low) / (high - low)
        return self.start + min(1.0, max(0.0, share)) * (self.end - self.start)

    def _of(self, value: float) -> float:
        return math.log10(value) if self.log else value


def draw(chart: Chart) -> str:
    """An <svg> element; the title and the values of `describe` are its text for screen readers."""
    x, y = scales(chart)
    label = escape(f"{chart.title}: {describe(chart)}", quote=True)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">',
        *_axes(x, y),
        *_references(chart, x, y),
    ]
    for number, curve in enumerate(chart.curves.values()):
        parts += _line(curve, x, y, f"c{number}", len(chart.curves) == 1)
    parts += _bands(chart, x, y)
    return "".join(parts) + "</svg>"


def describe(chart: Chart) -> str:
    """The course of each curve in words."""
    words = []
    for name, curve in chart.curves.items():
        known = curve.finite
        if not len(known.values):
            words.append(f"{name} has no finite value")
            continue
        lowest, highest = known.values.min(), known.values.max()
        words.append(
            f"{name} from {number(known.values[0])} at iteration {known.iterations[0]:.0f} to "
            f"{number(known.values[-1])} at {known.iterations[-1]:.0f}, between {number(lowest)} "
            f"and {number(highest)}"
        )
    return "; ".join(words)


def number(value: float) -> str:
    """A value in three digits."""
    return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e")


def scales(chart: Chart) -> tuple[Scale, Scale]:
    """Iterations and values; the latter logarithmic when they are positive and far apart."""
    iterations = np.concatenate([curve.iterations for curve in chart.curves.values()])
    values = np.concatenate([curve.finite.values for curve in chart.curves.values()])
    values = values if len(values) else np.zeros(1)
    low, high = float(values.min()), float(values.max())
    log = low > 0 and high > DECADES * low and len(chart.curves) == 1 and not chart.around_zero
    if chart.around_zero:
        high = max(abs(low), abs(high), 0.05)
        low = -high
    elif log:
        low, high = 10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high))
    else:
        near = [level for level, _ in chart.lines if level <= 1.5 * max(high, 1e-12)]
        low, high = min([low, *near]), max([high, *near])
        room = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
        low, high = (0.0 if 0 <= low < 0.5 * high else low - room), high + room
    first, last = float(iterations.min()), float(iterations.max())
    first, last = (0.0, last) if first < 0.2 * last else (first, last)
    x = Scale(first, last if last > first else first + 1, LEFT, WIDTH - RIGHT)
    return x, Scale(low, high, HEIGHT - BOTTOM, TOP, log)


def ticks(scale: Scale, most: int) -> list[float]:
    """At most about `most` round values within a scale."""
    if scale.log:
        first, last = round(math.log10(scale.low)), round(math.log10(scale.high))
        every = max(1, math.ceil((last - first) / most))
        return [10.0**power for power in range(first, last + 1, every)]
    rough = (scale.high - scale.low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(scale.low / step - 1e-9)
    return [k * step for k in range(first, math.floor(scale.high / step + 1e-9) + 1)]


def _axes(x: Scale, y: Scale) -> list[str]:
    """Grid lines with their values."""
    parts = []
    for value in ticks(y, 6):
        at = f"{y(value):.1f}"
        parts.append(f'<path class="grid" d="M{LEFT} {at}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at}" dy=".32em" text-anchor="end">'
                     f"{number(value)}</text>")  # fmt: skip
    places = [value for value in ticks(x, 4) if value == int(value)]
    for value in places:
        parts.append(f'<text x="{x(value):.1f}" y="{HEIGHT - 5}" text-anchor="middle">'
                     f"{_count(value)}</text>")  # fmt: skip
    return parts


def _count(value: float) -> str:
    """An iteration on the axis: 12000 is 12k."""
    return f"{value / 1000:g}k" if value >= 10000 and value % 100 == 0 else f"{value:.0f}"


def _references(chart: Chart, x: Scale, y: Scale) -> list[str]:
    """Levels and resumes, dashed."""
    parts = []
    for level, name in chart.lines:
        if y.low <= level <= y.high:
            at = y(level)
            parts.append(f'<path class="level" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>')
            parts.append(
                f'<text class="level" x="{LEFT + 4}" y="{at - 4:.1f}">{escape(name)}</text>'
            )
    for mark in chart.marks:
        parts.append(f'<path class="mark" d="M{x(mark):.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
    return parts


def _line(curve: Curve, x: Scale, y: Scale, css: str, alone: bool) -> list[str]:
    """The curve, faint under its running median where there are many rows; dots where few."""
    thin = thinned(curve)
    many = len(curve.values) >= SMOOTHED_FROM
    faint = " faint" if many and alone else ""
    parts = [f'<path class="curve {css}{faint}" d="{_path(thin, x, y)}"/>']
    if faint:
        parts.append(f'<path class="curve {css}" d="{_path(thinned(smoothed(curve)), x, y)}"/>')
    if not many:
        for i, value in zip(curve.finite.iterations, curve.finite.values, strict=True):
            parts.append(f'<circle class="{css}" cx="{x(i):.1f}" cy="{y(value):.1f}" r="2"/>')
    for i in curve.iterations[~np.isfinite(curve.values)][:POINTS]:
        parts.append(f'<text class="bad" x="{x(i):.1f}" y="{TOP + 9}" text-anchor="middle">'
                     "×</text>")  # fmt: skip
    return parts


def _path(curve: Curve, x: Scale, y: Scale) -> str:
    """Straight lines; a value that is not finite leaves a gap."""
    words, pen = [], "M"
    for i, value in zip(curve.iterations, curve.values, strict=True):
        if not math.isfinite(value):
            pen = "M"
            continue
        words.append(f"{pen}{x(i):.1f} {y(value):.1f}")
        pen = "L"
    return "".join(words) if len(words) > 1 else "M0 0"


def thinned(curve: Curve) -> Curve:
    """At most POINTS values, each bucket's lowest and highest, so that no peak is lost."""
    num = len(curve.values)
    if num <= POINTS:
        return curve
    keep: set[int] = set()
    for bucket in np.array_split(np.arange(num), POINTS // 2):
        values = curve.values[bucket]
        known = bucket[np.isfinite(values)]
        keep.update(bucket[~np.isfinite(values)][:1].tolist())
        if len(known):
            keep.add(int(known[np.argmin(curve.values[known])]))
            keep.add(int(known[np.argmax(curve.values[known])]))
    order = sorted(keep)
    return Curve(curve.iterations[order], curve.values[order])


def smoothed(curve: Curve) -> Curve:
    """The running median over a twelfth of the rows, at least five."""
    known = curve.finite
    half = max(2, len(known.values) // 24)
    values: Floats = np.array([
        np.median(known.values[max(0, i - half) : i + half + 1]) for i in range(len(known.values))
    ])  # fmt: skip
    return Curve(known.iterations, values)


def _bands(chart: Chart, x: Scale, y: Scale) -> list[str]:
    """Upright bands that say the values of their place when the pointer is on them."""
    first = next(iter(chart.curves.values()))
    num = len(first.iterations)
    places = sorted({round(k) for k in np.linspace(0, num - 1, min(num, BANDS))})
    parts = []
    for order, place in enumerate(places):
        i = float(first.iterations[place])
        left = LEFT if order == 0 else (x(i) + x(first.iterations[places[order - 1]])) / 2
        last = order == len(places) - 1
        right = WIDTH - RIGHT if last else (x(i) + x(first.iterations[places[order + 1]])) / 2
        said = [
            f"{name} {number(float(curve.values[at]))}{chart.unit}"
            for name, curve in chart.curves.items()
            if (at := int(np.searchsorted(curve.iterations, i))) < len(curve.values)
            and curve.iterations[at] == i
        ]
        title = escape(f"iteration {i:.0f}: " + ", ".join(said))
        parts.append(
            f'<g class="band"><path d="M{x(i):.1f} {TOP}V{HEIGHT - BOTTOM}"/>'
            f'<rect x="{left:.1f}" y="{TOP}" width="{max(0.5, right - left):.1f}" '
            f'height="{HEIGHT - BOTTOM - TOP}"><title>{title}</title></rect></g>'
        )
    return parts
