"""Warning signals: rules that look at a run's curves and say in words what is suspicious.

Pure: curves and a few facts of the configuration go in, sentences come out. A rule about a trend
compares the medians of the four quarters of a curve, so that neither one wild value nor the anchors
that happened to be drawn can trigger it, and says nothing about curves of fewer than MIN_ROWS rows.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

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
    resumed: tuple[int, ...] = ()  # the first row after each resume


@dataclass(frozen=True)
class Signal:
    """One thing that is suspicious."""

    rule: str
    curve: str
    words: str


@dataclass(frozen=True)
class Rule:
    """A name, what is looked for and why, and the function that looks."""

    name: str
    meaning: str
    look: Callable[[Curves, Facts], list[tuple[str, str]]] = field(repr=False)


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
    return [Signal(rule.name, *found) for rule in RULES for found in rule.look(curves, facts)]


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


def _named(curves: Curves, prefix: str) -> list[str]:
    return [name for name in curves if name.startswith(prefix)]


# ----------------------------------------------------------------------------------------- rules


def not_finite(curves: Curves, facts: Facts) -> list[tuple[str, str]]:
    """Infinite values and NaN."""
    found = []
    for name, curve in curves.items():
        bad = curve.iterations[~np.isfinite(curve.values)]
        if len(bad):
            rows = f"{len(bad)} row{'s' if len(bad) > 1 else ''}"
            found.append((name, f"{name} is not finite in {rows}, first at {bad[0]:.0f}."))
    return found


def growing_loss(curves: Curves, facts: Facts) -> list[tuple[str, str]]:
    """Losses that keep rising, or have just blown up."""
    found = []
    for name in LOSSES:
        q, curve = quarters_of(curves.get(name)), curves.get(name)
        if q and q.keeps_rising() and 0 < LOSS_GROWTH * q.medians[1] < q.medians[3]:
            grown = f"from {q.medians[1]:.3g} in the second quarter to {q.medians[3]:.3g} in the"
            found.append((name, f"{name} grows without levelling out, {grown} last."))
        elif curve and len(curve.values) >= MIN_ROWS:
            before = float(np.median(curve.values[:-LAST_ROWS]))
            if 0 < BLOWN_UP * before < float(_last(curve).min()):
                found.append((name, f"{name} has blown up: {curve.values[-1]:.3g} after a median "
                                    f"of {before:.3g}."))  # fmt: skip
    return found


def no_gradient(curves: Curves, facts: Facts) -> list[tuple[str, str]]:
    """Gradient norms that are zero, or nearly so beside what they were."""
    found = []
    for name in _named(curves, "grad_norm/"):
        last, q = _last(curves[name]), quarters_of(curves[name])
        part = name.removeprefix("grad_norm/")
        if len(last) and last.max() <= NO_GRADIENT:
            found.append((name, f"The {part} gets no gradient: its norm is 0 in the last "
                                f"{LAST_ROWS} rows."))  # fmt: skip
        elif q and q.medians[3] < VANISHED * min(q.medians[:2]):
            found.append((name, f"The {part}'s gradient has vanished: {q.medians[3]:.2g} after "
                                f"{min(q.medians[:2]):.2g}."))  # fmt: skip
    return found


def always_clipped(curves: Curves, facts: Facts) -> list[tuple[str, str]]:
    """Gradient norms far above the limit in every row of the second half."""
    limit, found = facts.max_grad_norm, []
    for name in _named(curves, "grad_norm/"):
        values = curves[name].finite.values
        late = values[len(values) // 2 :]
        if limit and len(values) >= MIN_ROWS and late.min() > FAR_CLIPPED * limit:
            found.append((name, f"{name} is at least {late.min():.3g} in every row of the second "
                                f"half, optimizer.max_grad_norm is {limit:g}: the step's length "
                                "says nothing any more."))  # fmt: skip
    return found


def growing_gap(curves: Curves, facts: Facts) -> list[tuple[str, str]]:
    """Fake score and student moving apart."""
    name = "ida/gap"
    q, last = quarters_of(curves.get(name)), _last(curves.get(name))
    advice = "" if facts.ida else " IDA is off (ida.lam: null)."
    if q and q.keeps_rising() and GAP_GROWTH * q.medians[1] < q.medians[3]:
        grown = f"from {q.medians[1]:.3g} in the second quarter to {q.medians[3]:.3g} in the last"
        return [(name, f"The gap between fake score and student grows steadily, {grown}: the fake "
                       f"score no longer follows.{advice}")]  # fmt: skip
    if len(last) and last.min() > LARGE_GAP:
        return [(name, f"The fake score is {last[-1]:.2g} of the student's size away from it: it "
                       f"is another network by now.{advice}")]  # fmt: skip
    return []


def margin_off(curves: Curves, facts: Facts) -> list[tuple[str, str]]:
    """A discriminator that has won for good, or that tells nothing apart."""
    name = "discriminator/margin"
    q = quarters_of(curves.get(name))
    most = LOGISTIC_SATURATED if facts.adversary == "bottleneck" else HINGE_SATURATED
    if q and q.medians[3] > most:
        return [(name, f"The discriminator's margin is {q.medians[3]:.3g} (saturated above "
                       f"{most:g}): it tells every image apart and the student learns nothing "
                       "from it.")]  # fmt: skip
    if q and q.medians[3] < NO_MARGIN:
        return [(name, f"The discriminator's margin is {q.medians[3]:.2g}: it does not tell real "
                       "images from generated ones.")]  # fmt: skip
    return []


def steady_drift(curves: Curves, facts: Facts) -> list[tuple[str, str]]:
    """Images that move away from the real ones: the first sign of collapse."""
    found = []
    for name in DRIFTS:
        curve = curves.get(name)
        q = quarters_of(curve)
        if not q or curve is None:
            continue
        sign, what = np.sign(q.medians[3]), name.removeprefix("drift/")
        away = quarters_of(Curve(curve.iterations, curve.values * sign))
        assert away
        moved = away.medians[3] - away.medians[1]
        if away.keeps_rising() and away.medians[3] > DRIFT and moved > DRIFT / 2:
            found.append((name, f"The images' {what} drifts steadily away from that of real ones, "
                                f"by {q.medians[3]:+.2f} on a scale of 0 to 1 by now: the first "
                                "sign of collapse."))  # fmt: skip
        elif away.medians[3] > FAR_DRIFT:
            found.append((name, f"The images' {what} is {q.medians[3]:+.2f} from that of real ones "
                                "on a scale of 0 to 1: look at the strips."))  # fmt: skip
    return found


def step_at_resume(curves: Curves, facts: Facts) -> list[tuple[str, str]]:
    """A step in a curve where the run was resumed."""
    found = []
    watched = [*LOSSES, *_named(curves, "grad_norm/"), "ida/gap", "discriminator/margin"]
    for start in facts.resumed:
        for name in (name for name in watched if name in curves):
            curve = curves[name].finite
            before = curve.values[curve.iterations < start][-STEP_ROWS:]
            after = curve.values[curve.iterations >= start][:STEP_ROWS]
            if min(len(before), len(after)) < STEP_ROWS:
                continue
            step, level = np.median(after) - np.median(before), abs(float(np.median(before)))
            spread = max(_spread(before), _spread(after), STEP_LEAST * level / STEP)
            apart = after.min() > before.max() or after.max() < before.min()
            if apart and abs(step) > STEP * spread:
                found.append((name, f"{name} steps from {np.median(before):.3g} to "
                                    f"{np.median(after):.3g} at iteration {start}, where the run "
                                    "was resumed: was the configuration, the data or the number "
                                    "of samples changed?"))  # fmt: skip
    return found


def fake_score_left_behind(curves: Curves, facts: Facts) -> list[tuple[str, str]]:
    """The fake score's loss grows while DMD's falls."""
    fake, dmd = quarters_of(curves.get("loss/fake")), quarters_of(curves.get("loss/dmd"))
    if not fake or not dmd:
        return []
    grows = fake.keeps_rising() and CROSSING * fake.medians[1] < fake.medians[3]
    falls = dmd.medians[1] > dmd.medians[2] > dmd.medians[3] and dmd.surely(1, 3)
    if grows and falls and CROSSING * dmd.medians[3] < dmd.medians[1]:
        return [("loss/fake", f"loss/fake grows ({fake.medians[1]:.3g} to {fake.medians[3]:.3g}) "
                              f"while loss/dmd falls ({dmd.medians[1]:.3g} to "
                              f"{dmd.medians[3]:.3g}): the student runs from a fake score that "
                              "does not know it.")]  # fmt: skip
    return []


def standstill(curves: Curves, facts: Facts) -> list[tuple[str, str]]:
    """Learning rates of zero and losses that are the same number in row after row."""
    found = []
    for name in _named(curves, "lr/"):
        last = _last(curves[name])
        if len(last) and not last.any():
            found.append((name, f"{name} is 0 in the last {LAST_ROWS} rows: nothing is learnt."))
    for name in LOSSES:
        q = quarters_of(curves.get(name))
        if q and np.ptp(curves[name].finite.values[-MIN_ROWS // 2 :]) == 0:
            found.append((name, f"{name} is the same number in the last {MIN_ROWS // 2} rows."))
    return found


def growing_memory(curves: Curves, facts: Facts) -> list[tuple[str, str]]:
    """A peak that still rises late in the run."""
    name = "mem_gib"
    q = quarters_of(curves.get(name))
    if (
        q
        and q.medians[3] > q.medians[2] > MEMORY_GROWTH**0.5 * q.medians[1]
        and (q.medians[3] > MEMORY_GROWTH * q.medians[1])
    ):
        return [(name, f"The peak of device memory still rises, to {q.medians[3]:.1f} GiB: "
                       "something is kept from iteration to iteration.")]  # fmt: skip
    return []


RULES = (
    Rule(
        "non-finite values",
        "Any infinite value or NaN. The run itself stops at one, so a row that holds one was "
        "written by something else.",
        not_finite,
    ),
    Rule(
        "growing loss",
        f"A loss (dmd, isg, fake, discriminator) whose quarters rise, do not level out, and grow "
        f"{LOSS_GROWTH:g} times from the second to the last; or whose last {LAST_ROWS} rows are "
        f"{BLOWN_UP:g} times the median of all before.",
        growing_loss,
    ),
    Rule(
        "no gradient",
        f"A gradient norm of 0 in the last {LAST_ROWS} rows, or fallen to {VANISHED:g} of its "
        "first half: a part that is frozen, cut off, or saturated.",
        no_gradient,
    ),
    Rule(
        "always clipped",
        f"A gradient norm more than {FAR_CLIPPED:g} times optimizer.max_grad_norm in every row of "
        "the second half. Norms a few times the limit are usual: AdamW does not mind the scale.",
        always_clipped,
    ),
    Rule(
        "IDA gap",
        f"The distance of fake score and student over the student's size, growing {GAP_GROWTH:g} "
        f"times from the second quarter to the last without levelling out, or above {LARGE_GAP:g}: "
        "DMD's gradient is right only while the fake score follows the student.",
        growing_gap,
    ),
    Rule(
        "discriminator margin",
        f"The mean of D(real) - D(generated) above {HINGE_SATURATED:g} (hinge) or "
        f"{LOGISTIC_SATURATED:g} (logistic, DMD2), or below {NO_MARGIN:g}, in the last quarter.",
        margin_off,
    ),
    Rule(
        "image drift",
        f"Mean, contrast or saturation of generated images moving away from the real ones', "
        f"quarter by quarter, past {DRIFT:g} of the range; or {FAR_DRIFT:g} away, whatever the "
        "trend.",
        steady_drift,
    ),
    Rule(
        "step at a resume",
        f"The {STEP_ROWS} rows after a resume lie all above or all below the {STEP_ROWS} before, "
        f"by {STEP:g} standard deviations and {STEP_LEAST:.0%} of their level.",
        step_at_resume,
    ),
    Rule(
        "fake score left behind",
        f"loss/fake grows {CROSSING:g} times from the second quarter to the last while loss/dmd "
        "falls as much.",
        fake_score_left_behind,
    ),
    Rule(
        "standstill",
        f"A learning rate of 0 in the last {LAST_ROWS} rows, or a loss that is the same number in "
        f"the last {MIN_ROWS // 2}.",
        standstill,
    ),
    Rule(
        "growing memory",
        f"The peak of device memory still rises, by {MEMORY_GROWTH - 1:.0%} from the second "
        "quarter to the last.",
        growing_memory,
    ),
)
