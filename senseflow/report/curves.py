"""Which measures of stats.jsonl are drawn where, what each of them means, and their drawing.

`chart.html` is the drawing, inline SVG; here are its scales and its paths.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from markupsafe import Markup

from senseflow.common.templates import templates
from senseflow.report.signals import Curve, Curves, Facts, Floats

WIDTH, HEIGHT = 360, 156  # units of the drawing; it scales with its place in the page
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 8, 22
POINTS = 240  # drawn per curve; of more, each bucket's lowest and highest
LETTER = 5.0  # width of one in the name of a level, about
BANDS = 60  # places to hover at
SMOOTHED_FROM = 24  # rows, from which a running median is drawn over the curve
DECADES = 50  # highest over lowest value from which the scale is logarithmic


ABOUT = {
    "loss/dmd": "How far teacher and fake score disagree about the student's samples. It need not "
    "fall while the student moves.",
    "loss/isg": "The student's one step down a segment against the teacher's way through "
    "its middle.",
    "loss/adv": "Falls when the student's images look real to the discriminator.",
    "loss/generator": "The weighted sum of dmd, isg and adv: what the student's step goes down.",
    "loss/fake": "The fake score's denoising error on the student's samples.",
    "loss/discriminator": "The heads' own loss; near 0 they have won.",
    "loss/grpo": "The sampler's steps weighted by advantages: near 0 by construction, and no "
    "measure of progress.",
    "loss/reward": "Minus the weighted rewards of x decoded, whose gradient trains.",
    "grpo/advantage": "Mean size of the advantages; lower where groups have equal rewards.",
    "grpo/equal_groups": "Groups of a rollout whose rewards are all equal: they teach nothing.",
    "grpo/diversity": "How far apart images of one prompt are: root mean square of the difference "
    "of two of a group, at 32 pixels, on a scale of 0 to 1.",
    "grpo/clipped": "Share of ratios beyond reward.clip; 0 with one update per rollout.",
    "grad_norm/generator": "Before clipping.",
    "grad_norm/fake_score": "Before clipping.",
    "grad_norm/discriminator": "Before clipping.",
    "ida/gap": "Distance of fake score and student over the student's size; should level out.",
    "discriminator/margin": "Mean D(real) − D(generated); 0 tells nothing apart.",
    "drift/mean": "Generated minus real images, on a scale of 0 to 1.",
    "drift/contrast": "Generated minus real images, on a scale of 0 to 1.",
    "drift/saturation": "Generated minus real images, on a scale of 0 to 1.",
    "time_s/iteration": "Wall time, saves not counted.",
    "mem_gib": "The peak of device memory so far.",
}
GROUPS = {  # and how the names of their measures begin
    "Losses": ("loss/",),
    "Rewards": ("reward/", "reward_spread/", "grpo/"),
    "Gradient norms": ("grad_norm/",),
    "Stability": ("ida/", "discriminator/", "drift/", "skipped/"),
    "Schedule, time and memory": ("lr/", "time_s/", "mem_gib"),
}
OTHER = "Other measures"
BEGINS = {  # what measures mean that are named after what a run names
    "reward/": "Mean of a rollout's images.",
    "reward_spread/": "Standard deviation within a group, the mean over groups.",
}
NAMES = {"lr/": "learning rates", "time_s/": "phases"}  # measures drawn in one picture


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
    measures: tuple[str, ...] = ()  # of the curves, by their whole names

    @property
    def group(self) -> str:
        """The part of the page it stands in."""
        first = self.measures[0]
        return next((group for group, begins in GROUPS.items() if first.startswith(begins)), OTHER)


def charts_of(curves: Curves, facts: Facts) -> list[Chart]:
    """All measures, group by group in the order of ABOUT; those nobody has named come last."""
    charts = []
    together: dict[str, dict[str, str]] = {}
    for name in dict.fromkeys([*ABOUT, *curves]):
        prefix = next((p for p in NAMES if name.startswith(p)), None)
        if name not in curves:
            continue
        if prefix and name != "time_s/iteration":
            together.setdefault(prefix, {})[name.removeprefix(prefix)] = name
        else:
            charts.append(_single(name, curves, facts))
    for prefix, measures in together.items():
        chart = Chart(
            NAMES[prefix],
            {short: curves[name] for short, name in measures.items()},
            about="" if prefix == "lr/" else "Where the time of an iteration goes.",
            marks=facts.resumed,
            unit=" s" if prefix == "time_s/" else "",
            measures=tuple(measures.values()),
        )
        charts.append(chart)
    order = [*GROUPS, OTHER]
    return sorted(charts, key=lambda chart: order.index(chart.group))


def _single(name: str, curves: Curves, facts: Facts) -> Chart:
    lines: tuple[tuple[float, str], ...] = ()
    if name.startswith("grad_norm/") and facts.max_grad_norm:
        lines = ((facts.max_grad_norm, "clipped above"),)
    if name == "discriminator/margin" and facts.adversary == "vfm":
        lines = ((2.0, "the hinge lets go"),)
    if name.startswith("drift/"):
        lines = ((0.0, ""),)
    return Chart(
        name,
        {name: curves[name]},
        about=ABOUT.get(name) or next((BEGINS[b] for b in BEGINS if name.startswith(b)), ""),
        lines=lines,
        marks=facts.resumed,
        around_zero=name.startswith("drift/"),
        unit=" s" if name.startswith("time_s/") else " GiB" if name == "mem_gib" else "",
        measures=(name,),
    )


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

    def at(self, value: float) -> str:
        """Where a value lies, in digits as an SVG attribute has them."""
        return f"{self(value):.1f}"

    def _of(self, value: float) -> float:
        return math.log10(value) if self.log else value


@dataclass(frozen=True)
class Line:
    """A curve as drawn: faint under its running median where it has many rows, dots where few."""

    strokes: list[tuple[str, str]]  # CSS class and path
    dots: list[tuple[str, str]]
    gaps: list[str]  # where the value is not finite


def draw(chart: Chart) -> Markup:
    """An <svg> element; the title and the values of `describe` are its text for screen readers."""
    x, y = scales(chart)
    alone = len(chart.curves) == 1
    found = templates(Path(__file__).parent).get_template("chart.html").render(
        chart=chart,
        described=describe(chart),
        width=WIDTH, height=HEIGHT, left=LEFT, right=WIDTH - RIGHT, top=TOP, bottom=HEIGHT - BOTTOM,
        x=x,
        y=y,
        levels=ticks(y, 6),
        iterations=[value for value in ticks(x, 4) if value == int(value)],
        references=[
            (level, name, _free_place(level, name, chart, x, y))
            for level, name in chart.lines
            if y.low <= level <= y.high
        ],
        lines=[_line(c, x, y, f"c{k}", alone) for k, c in enumerate(chart.curves.values())],
        bands=_bands(chart, x),
        number=number,
        count=_count,
    )  # fmt: skip
    return Markup(found)


def _free_place(level: float, name: str, chart: Chart, x: Scale, y: Scale) -> tuple[str, str, str]:
    """Where the name of a level stands, x, y and text-anchor: at an end of its line, above or below
    it, where no curve comes through; above its beginning where all of them do."""
    spans = {"start": (x.start + 4, x.start + 4 + LETTER * len(name)),
             "end": (x.end - 4 - LETTER * len(name), x.end - 4)}  # fmt: skip
    places = [(base, end) for base in (y(level) - 4, y(level) + 11) for end in spans]
    inside = [place for place in places if TOP + 8 <= place[0] <= HEIGHT - BOTTOM] or places

    def is_free(place: tuple[float, str]) -> bool:
        base, end = place
        heights = [_heights(curve, x, y, *spans[end]) for curve in chart.curves.values()]
        return all(lowest < base - 9 or base + 2 < highest for highest, lowest in heights)

    base, end = next(filter(is_free, inside), inside[0])
    return f"{spans[end][end == 'end']:.1f}", f"{base:.1f}", end


def _heights(curve: Curve, x: Scale, y: Scale, begin: float, end: float) -> tuple[float, float]:
    """The highest and the lowest place of a curve, as y of the drawing, between two x of it."""
    known = thinned(curve).finite
    across = np.array([x(float(i)) for i in known.iterations])
    if not len(across) or across[-1] < begin or end < across[0]:
        return math.inf, -math.inf
    drawn = np.array([y(float(value)) for value in known.values])
    passed = drawn[(begin <= across) & (across <= end)]
    heights = [*passed, *np.interp([begin, end], across, drawn)]
    return min(heights), max(heights)


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
    # several curves are compared by their heights, which a logarithm would not keep
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
    first, last = (0.0, last) if first < 0.2 * last or first == last else (first, last)
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


def _count(value: float) -> str:
    """An iteration on the axis: 12000 is 12k."""
    return f"{value / 1000:g}k" if value >= 10000 and value % 100 == 0 else f"{value:.0f}"


def _line(curve: Curve, x: Scale, y: Scale, css: str, alone: bool) -> Line:
    many = len(curve.values) >= SMOOTHED_FROM
    strokes = [(css, _path(thinned(curve), x, y))]
    if many and alone:
        strokes = [(f"{css} faint", strokes[0][1]), (css, _path(thinned(smoothed(curve)), x, y))]
    known = [] if many else zip(curve.finite.iterations, curve.finite.values, strict=True)
    wild = curve.iterations[~np.isfinite(curve.values)][:POINTS]
    return Line(strokes, [(x.at(i), y.at(value)) for i, value in known], [x.at(i) for i in wild])


def _path(curve: Curve, x: Scale, y: Scale) -> str:
    """Straight lines; a value that is not finite leaves a gap."""
    words, pen = [], "M"
    for i, value in zip(curve.iterations, curve.values, strict=True):
        if not math.isfinite(value):
            pen = "M"
            continue
        words.append(f"{pen}{x.at(i)} {y.at(value)}")
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


def _bands(chart: Chart, x: Scale) -> list[tuple[str, str, str, str]]:
    """Middle, left edge, width and words of upright bands, which say the values of their place when
    the pointer is on them.
    """
    first = next(iter(chart.curves.values()))
    num = len(first.iterations)
    places = sorted({round(k) for k in np.linspace(0, num - 1, min(num, BANDS))})
    middles = [x(float(first.iterations[place])) for place in places]
    edges = [LEFT, *((a + b) / 2 for a, b in pairwise(middles)), WIDTH - RIGHT]
    bands = []
    for place, middle, (left, right) in zip(places, middles, pairwise(edges), strict=True):
        i = float(first.iterations[place])
        said = [
            f"{name} {number(float(curve.values[at]))}{chart.unit}"
            for name, curve in chart.curves.items()
            if (at := int(np.searchsorted(curve.iterations, i))) < len(curve.values)
            and curve.iterations[at] == i
        ]
        words = f"iteration {i:.0f}: " + ", ".join(said)
        bands.append((f"{middle:.1f}", f"{left:.1f}", f"{max(0.5, right - left):.1f}", words))
    return bands
