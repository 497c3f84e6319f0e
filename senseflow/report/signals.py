"""Warning signals: rules that look at a run's curves and say in words what is suspicious.

Pure: curves and a few facts of the configuration go in, sentences come out. A rule about a trend
compares the medians of the four quarters of a curve, so that neither one wild value nor the anchors
that happened to be drawn can trigger it, and says nothing about curves of fewer than MIN_ROWS rows.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MIN_ROWS = 16  # four per quarter: the fewest whose median and spread mean something
SURE = 3.0  # standard errors by which two medians must differ
GOES_ON = 0.5  # the last quarter's rise over the one before: a curve that levels out has less
LOSS_GROWTH = 3.0  # over half a run; DMD's loss doubles while the student leaves the teacher
BLOWN_UP = 10.0  # times the median of all values before
LAST_ROWS = 3  # a state of the last rows, not of one
NO_GRADIENT = 1e-12  # gradient norms of a part that works are 1e-4 and more
VANISHED = 1e-3  # of the first half's median; AdamW then moves on the noise
FAR_CLIPPED = 100.0  # times max_grad_norm: some clipping is usual and AdamW does not mind it
GAP_GROWTH = 2.0  # over half a run; a random walk makes 1.5, a linear one 2.3
LARGE_GAP = 0.5  # of the student's weights: the fake score has become another network
HINGE_SATURATED = 6.0  # three times the 2 at which the hinge stops pulling
LOGISTIC_SATURATED = 12.0  # softplus(-6) = .002 on each side: no gradient left
NO_MARGIN = 0.001  # the heads tell nothing apart; 0 is chance
DRIFT = 0.05  # of the range [0, 1]: what the eye begins to see
FAR_DRIFT = 0.25  # of the range [0, 1]: grey, black or burnt out, whatever the trend
STEP = 5.0  # robust standard deviations between the rows before and after a resume
STEP_ROWS = 5  # rows compared on each side
STEP_LEAST = 0.25  # of the level: smaller steps are of no consequence
CROSSING = 1.5  # growth of one and fall of the other, over half a run
ALIKE = 0.9  # of a group's diversity at first: what the embedded students are held to
MEMORY_GROWTH = 1.05  # in the second half, when every allocation of an iteration has been seen

LOSSES = ("loss/dmd", "loss/isg", "loss/fake", "loss/discriminator")
DRIFTS = ("drift/mean", "drift/contrast", "drift/saturation")

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """One measure: values (N,) at rising iterations (N,)."""

    iterations: Floats
    values: Floats

    @property
    def finite(self) -> "Curve":
        """Without the rows that are not finite."""
        keep = np.isfinite(self.values)
        return Curve(self.iterations[keep], self.values[keep])


Curves = dict[str, Curve]


@dataclass(frozen=True)
class Facts:
    """What the rules need to know of the configuration and of the run."""

    max_grad_norm: float | None = None
    ida: bool = True
    adversary: str = "vfm"  # or "bottleneck", whose loss is logistic
    resumed: tuple[int, ...] = ()  # the first iteration after each resume


@dataclass(frozen=True)
class Signal:
    """One thing that is suspicious."""

    rule: str
    curve: str
    words: str


@dataclass(frozen=True)
class Rule:
    """A name, what is looked for and why, the function that looks at a curve, and at which."""

    name: str
    meaning: str
    look: Callable[[str, Curves, Facts], str | None]
    watches: tuple[str, ...] = ("",)  # measures, or how their names begin


def curves_of(rows: list[dict[str, float]]) -> Curves:
    """The curve of each measure in the rows of stats.jsonl; a row need not have all of them."""
    names = dict.fromkeys(name for row in rows for name in row if name != "iteration")
    curves = {}
    for name in names:
        points = [(row["iteration"], row[name]) for row in rows if name in row]
        iterations, values = np.array(points, dtype=np.float64).T
        curves[name] = Curve(iterations, values)
    return curves


def find_signals(curves: Curves, facts: Facts) -> list[Signal]:
    """What each of RULES finds, in their order."""
    return [
        Signal(rule.name, name, words)
        for rule in RULES
        for watched in rule.watches
        for name in curves
        if name.startswith(watched) and (words := rule.look(name, curves, facts))
    ]


# ------------------------------------------------------------------------------------ arithmetic


@dataclass(frozen=True)
class Quarters:
    """Medians of the four quarters of a curve, and their standard errors."""

    medians: tuple[float, ...]
    errors: tuple[float, ...]

    def surely(self, early: int, late: int) -> bool:
        """Whether the medians of two quarters differ by more than chance."""
        difference = abs(self.medians[late] - self.medians[early])
        return difference > SURE * float(np.hypot(self.errors[early], self.errors[late]))

    def keeps_rising(self) -> bool:
        """Whether the last three quarters rise, surely, and do not level out."""
        _, b, c, d = self.medians
        return b < c < d and self.surely(1, 3) and d - c >= GOES_ON * (c - b)

    @property
    def rise(self) -> str:
        """From where to where, in words."""
        early, late = self.medians[1], self.medians[3]
        return f"from {early:.3g} in the second quarter to {late:.3g} in the last"


def quarters_of(curve: Curve | None) -> Quarters | None:
    """None for a curve that is not there or has fewer than MIN_ROWS finite values."""
    values = curve.finite.values if curve else np.empty(0)
    if len(values) < MIN_ROWS:
        return None
    parts = np.array_split(values, 4)
    errors = [1.2533 * _spread(part) / len(part) ** 0.5 for part in parts]  # sqrt(pi / 2)
    return Quarters(tuple(float(np.median(part)) for part in parts), tuple(errors))


def _spread(values: Floats) -> float:
    """The standard deviation of Gaussian values, from the median distance to their median."""
    return 1.4826 * float(np.median(np.abs(values - np.median(values))))


def _last(curve: Curve | None) -> Floats:
    """The last LAST_ROWS values; empty for a shorter curve."""
    values = curve.values if curve else np.empty(0)
    return values[-LAST_ROWS:] if len(values) >= LAST_ROWS else np.empty(0)


# ----------------------------------------------------------------------------------------- rules


def _not_finite(name: str, curves: Curves, facts: Facts) -> str | None:
    bad = curves[name].iterations[~np.isfinite(curves[name].values)]
    rows = f"{len(bad)} row{'s' if len(bad) > 1 else ''}"
    return f"{name} is not finite in {rows}, first at {bad[0]:.0f}." if len(bad) else None


def _skipped(name: str, curves: Curves, facts: Facts) -> str | None:
    curve, part = curves[name], name.removeprefix("skipped/")
    if part == "stops":
        times = f"{curve.values[-1]:.0f} time{'s' if curve.values[-1] > 1 else ''}"
        return f"The run stopped {times} over steps that were not finite, and went on anew."
    num = curve.values.sum()
    steps = f"{num:.0f} step{'s' if num > 1 else ''} of the {part}"
    return f"{steps} not finite and skipped, first by iteration {curve.iterations[0]:.0f}."


def _growing_loss(name: str, curves: Curves, facts: Facts) -> str | None:
    q, values = quarters_of(curves[name]), curves[name].values
    if q and q.keeps_rising() and 0 < LOSS_GROWTH * q.medians[1] < q.medians[3]:
        return f"{name} grows without levelling out, {q.rise}."
    if len(values) >= MIN_ROWS:
        before = float(np.median(values[:-LAST_ROWS]))
        if 0 < BLOWN_UP * before < float(values[-LAST_ROWS:].min()):
            return f"{name} has blown up: {values[-1]:.3g} after a median of {before:.3g}."
    return None


def _no_gradient(name: str, curves: Curves, facts: Facts) -> str | None:
    last, q = _last(curves[name]), quarters_of(curves[name])
    part = name.removeprefix("grad_norm/")
    if len(last) and last.max() <= NO_GRADIENT:
        return f"The {part} gets no gradient: its norm is 0 in the last {LAST_ROWS} rows."
    if q and q.medians[3] < VANISHED * (first := min(q.medians[:2])):
        return f"The {part}'s gradient has vanished: {q.medians[3]:.2g} after {first:.2g}."
    return None


def _always_clipped(name: str, curves: Curves, facts: Facts) -> str | None:
    limit, values = facts.max_grad_norm, curves[name].finite.values
    late = values[len(values) // 2 :]
    if not limit or len(values) < MIN_ROWS or late.min() <= FAR_CLIPPED * limit:
        return None
    return (
        f"{name} is at least {late.min():.3g} in every row of the second half, "
        f"optimizer.max_grad_norm is {limit:g}: the step's length says nothing any more."
    )


def _growing_gap(name: str, curves: Curves, facts: Facts) -> str | None:
    q, last = quarters_of(curves[name]), _last(curves[name])
    advice = "" if facts.ida else " IDA is off (ida.lam: null)."
    if q and q.keeps_rising() and GAP_GROWTH * q.medians[1] < q.medians[3]:
        return (
            f"The gap between fake score and student grows steadily, {q.rise}: the fake score no "
            f"longer follows.{advice}"
        )
    if len(last) and last.min() > LARGE_GAP:
        return (
            f"The fake score is {last[-1]:.2g} of the student's size away from it: it is another "
            f"network by now.{advice}"
        )
    return None


def _margin_off(name: str, curves: Curves, facts: Facts) -> str | None:
    q = quarters_of(curves[name])
    most = LOGISTIC_SATURATED if facts.adversary == "bottleneck" else HINGE_SATURATED
    if q and q.medians[3] > most:
        return (
            f"The discriminator's margin is {q.medians[3]:.3g} (saturated above {most:g}): it "
            "tells every image apart and the student learns nothing from it."
        )
    if q and q.medians[3] < NO_MARGIN:
        return (
            f"The discriminator's margin is {q.medians[3]:.2g}: it does not tell real images from "
            "generated ones."
        )
    return None


def _steady_drift(name: str, curves: Curves, facts: Facts) -> str | None:
    curve, what = curves[name], name.removeprefix("drift/")
    q = quarters_of(curve)
    away = q and quarters_of(Curve(curve.iterations, curve.values * np.sign(q.medians[3])))
    if not q or not away:
        return None
    moved, by = away.medians[3] - away.medians[1], f"{q.medians[3]:+.2f}"
    if away.keeps_rising() and away.medians[3] > DRIFT and moved > DRIFT / 2:
        return (
            f"The images' {what} drifts steadily away from that of real ones, by {by} on a scale "
            "of 0 to 1 by now: the first sign of collapse."
        )
    if away.medians[3] > FAR_DRIFT:
        return (
            f"The images' {what} is {by} from that of real ones on a scale of 0 to 1: look at the "
            "strips."
        )
    return None


def _step_at_resume(name: str, curves: Curves, facts: Facts) -> str | None:
    curve, steps = curves[name].finite, []
    for start in facts.resumed:
        before = curve.values[curve.iterations < start][-STEP_ROWS:]
        after = curve.values[curve.iterations >= start][:STEP_ROWS]
        if min(len(before), len(after)) < STEP_ROWS:
            continue
        low, high = float(np.median(before)), float(np.median(after))
        spread = max(_spread(before), _spread(after), STEP_LEAST * abs(low) / STEP)
        apart = after.min() > before.max() or after.max() < before.min()
        if apart and abs(high - low) > STEP * spread:
            steps.append(
                f"{name} steps from {low:.3g} to {high:.3g} at iteration {start}, where the run "
                "was resumed: was the configuration, the data or the number of samples changed?"
            )
    return " ".join(steps) or None


def _fake_score_left_behind(name: str, curves: Curves, facts: Facts) -> str | None:
    fake, dmd = quarters_of(curves[name]), quarters_of(curves.get("loss/dmd"))
    if not fake or not dmd:
        return None
    grows = fake.keeps_rising() and CROSSING * fake.medians[1] < fake.medians[3]
    falls = dmd.medians[1] > dmd.medians[2] > dmd.medians[3] and dmd.surely(1, 3)
    if not grows or not falls or CROSSING * dmd.medians[3] >= dmd.medians[1]:
        return None
    rise, fall = (f"{q.medians[1]:.3g} to {q.medians[3]:.3g}" for q in (fake, dmd))
    return (
        f"loss/fake grows ({rise}) while loss/dmd falls ({fall}): the student runs from a fake "
        "score that does not know it."
    )


def _falling_reward(name: str, curves: Curves, facts: Facts) -> str | None:
    falling = quarters_of(curves[name])
    if not falling or not _goes(falling, -1):
        return None
    found = {other: quarters_of(curves[other]) for other in curves if other.startswith("reward/")}
    rising = [other for other, q in found.items() if q and _goes(q, 1)]
    if not rising:
        return None
    return (
        f"{name} falls, {falling.rise}, while {rising[0]} rises: what is trained for is being "
        "hacked, or the two cannot both be had."
    )


def _growing_alike(name: str, curves: Curves, facts: Facts) -> str | None:
    q = quarters_of(curves[name])
    if not q or not _goes(q, -1) or q.medians[3] >= ALIKE * q.medians[0]:
        return None
    return (
        f"Images of one prompt become alike: {name} is {q.medians[3]:.3g} in the last quarter, "
        f"{q.medians[3] / q.medians[0]:.0%} of the first."
    )


def _goes(q: Quarters, sign: int) -> bool:
    """Whether the last three quarters go up (1) or down (-1), and surely."""
    _, b, c, d = (sign * median for median in q.medians)
    return b < c < d and q.surely(1, 3)


def _standstill(name: str, curves: Curves, facts: Facts) -> str | None:
    last, values = _last(curves[name]), curves[name].finite.values
    if name.startswith("lr/"):
        still = len(last) and not last.any()
        return f"{name} is 0 in the last {LAST_ROWS} rows: nothing is learnt." if still else None
    if len(values) >= MIN_ROWS and np.ptp(values[-MIN_ROWS // 2 :]) == 0:
        return f"{name} is the same number in the last {MIN_ROWS // 2} rows."
    return None


def _growing_memory(name: str, curves: Curves, facts: Facts) -> str | None:
    q = quarters_of(curves[name])
    if not q or not q.medians[3] > q.medians[2] > MEMORY_GROWTH**0.5 * q.medians[1]:
        return None
    if q.medians[3] <= MEMORY_GROWTH * q.medians[1]:
        return None
    return (
        f"The peak of device memory still rises, to {q.medians[3]:.1f} GiB: something is kept "
        "from iteration to iteration."
    )


RULES = (
    Rule(
        "non-finite values",
        "Any infinite value or NaN. The run itself leaves them out, so a row that holds one was "
        "written by something else.",
        _not_finite,
    ),
    Rule(
        "skipped steps",
        "Any step whose gradient was not finite: it changed nothing. More than train.max_skipped "
        "in a row stop the run.",
        _skipped,
        ("skipped/",),
    ),
    Rule(
        "growing loss",
        f"A loss (dmd, isg, fake, discriminator) whose quarters rise, do not level out, and grow "
        f"{LOSS_GROWTH:g} times from the second to the last; or whose last {LAST_ROWS} rows are "
        f"{BLOWN_UP:g} times the median of all before.",
        _growing_loss,
        LOSSES,
    ),
    Rule(
        "no gradient",
        f"A gradient norm of 0 in the last {LAST_ROWS} rows, or fallen to {VANISHED:g} of its "
        "first half: a part that is frozen, cut off, or saturated.",
        _no_gradient,
        ("grad_norm/",),
    ),
    Rule(
        "always clipped",
        f"A gradient norm more than {FAR_CLIPPED:g} times optimizer.max_grad_norm in every row of "
        "the second half. Norms a few times the limit are usual: AdamW does not mind the scale.",
        _always_clipped,
        ("grad_norm/",),
    ),
    Rule(
        "IDA gap",
        f"The distance of fake score and student over the student's size, growing {GAP_GROWTH:g} "
        f"times from the second quarter to the last without levelling out, or above {LARGE_GAP:g}: "
        "DMD's gradient is right only while the fake score follows the student.",
        _growing_gap,
        ("ida/gap",),
    ),
    Rule(
        "discriminator margin",
        f"The mean of D(real) - D(generated) above {HINGE_SATURATED:g} (hinge) or "
        f"{LOGISTIC_SATURATED:g} (logistic, DMD2), or below {NO_MARGIN:g}, in the last quarter.",
        _margin_off,
        ("discriminator/margin",),
    ),
    Rule(
        "image drift",
        f"Mean, contrast or saturation of generated images moving away from the real ones', "
        f"quarter by quarter, past {DRIFT:g} of the range; or {FAR_DRIFT:g} away, whatever the "
        "trend.",
        _steady_drift,
        DRIFTS,
    ),
    Rule(
        "step at a resume",
        f"The {STEP_ROWS} rows after a resume lie all above or all below the {STEP_ROWS} before, "
        f"by {STEP:g} standard deviations and {STEP_LEAST:.0%} of their level.",
        _step_at_resume,
        (*LOSSES, "grad_norm/", "ida/gap", "discriminator/margin"),
    ),
    Rule(
        "fake score left behind",
        f"loss/fake grows {CROSSING:g} times from the second quarter to the last while loss/dmd "
        "falls as much.",
        _fake_score_left_behind,
        ("loss/fake",),
    ),
    Rule(
        "falling reward",
        "A reward whose last three quarters fall while another's rise. A reward of weight 0 is "
        "there to be watched so.",
        _falling_reward,
        ("reward/",),
    ),
    Rule(
        "images alike",
        f"The distance between images of one prompt falls over the last three quarters, to less "
        f"than {ALIKE:g} of the first: a reward is being had by drawing one picture.",
        _growing_alike,
        ("grpo/diversity",),
    ),
    Rule(
        "standstill",
        f"A learning rate of 0 in the last {LAST_ROWS} rows, or a loss that is the same number in "
        f"the last {MIN_ROWS // 2}.",
        _standstill,
        ("lr/", *LOSSES),
    ),
    Rule(
        "growing memory",
        f"The peak of device memory still rises, by {MEMORY_GROWTH - 1:.0%} from the second "
        "quarter to the last.",
        _growing_memory,
        ("mem_gib",),
    ),
)
