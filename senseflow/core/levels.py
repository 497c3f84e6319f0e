"""Which noise levels a student is sampled at: its trained anchors, some of them, or twice as many.

Flow students count in sigmas, 1 (pure noise) to 0; SDXL's in integer timesteps, 999 to 0.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

SAME_SIGMA = 1e-6  # further apart, float32 is not the reason


@dataclass(frozen=True)
class Levels:
    """One way to count noise: how it is called, compared, and made denser."""

    name: str  # of the pipelines' argument, the sidecar's key and the flag
    number: type[float] | type[int]
    tolerance: float  # within which a number typed by hand is an anchor
    fits: Callable[[Sequence[float]], bool]  # whether falling numbers are counted this way
    denser: Callable[[list[float]], list[float]]  # K anchors -> 2K levels, the anchors among them

    @property
    def flag(self) -> str:
        """The command line's flag that takes them."""
        return f"--{self.name}"

    def of_steps(self, anchors: list[float], steps: int, two_steps: str = "spread") -> list[float]:
        """The levels of `steps` steps for a student trained at K anchors: a divisor of K, or 2K.

        Of K anchors, evenly spread from the first one; with two_steps "first", two steps are the
        first two. 2K: `denser`. Raises ValueError for other numbers.
        """
        num, possible = len(anchors), _divisors(len(anchors))
        if steps == 2 < num and two_steps == "first":
            return anchors[:2]
        if steps in possible:
            return anchors[:: num // steps]
        if steps == 2 * num:
            return self.denser(anchors)
        possible.append(2 * num)
        raise ValueError(f"{steps}: a student of {num} anchors samples in {possible} steps")

    def possible_steps(self, anchors: list[float]) -> list[int]:
        """The numbers that `of_steps` takes, rising; without 2K where `denser` has no answer."""
        try:
            self.denser(anchors)
        except ValueError:
            return _divisors(len(anchors))
        return [*_divisors(len(anchors)), 2 * len(anchors)]

    def among(self, anchors: list[float], wanted: list[float]) -> list[float]:
        """The anchors that `wanted` names, which must fall from the first one.

        Raises ValueError, naming the anchors, when a number is none of them or they do not fall.
        """
        chosen = []
        for value in wanted:
            nearest = min(anchors, key=lambda anchor: abs(anchor - value))
            # So put, NaN is none of them.
            if not abs(nearest - value) <= self.tolerance:
                raise ValueError(f"{value:g} is none of the trained anchors {_said(anchors)}")
            chosen.append(nearest)
        if any(a <= b for a, b in pairwise(chosen)):
            raise ValueError(f"{_said(wanted)} do not fall as the trained anchors {_said(anchors)}")
        if chosen[0] != anchors[0]:
            raise ValueError(
                f"{_said(wanted)} do not begin with the first of the trained anchors "
                f"{_said(anchors)}, where the sample is pure noise"
            )
        return chosen

    def check(self, anchors: Sequence[float]) -> None:
        """Raise ValueError when a card's anchors are not counted this way."""
        if not self.fits(anchors):
            raise ValueError(f"the card's anchors {_said(anchors)} are not {self.name}")


def _divisors(num: int) -> list[int]:
    return [n for n in range(1, num + 1) if num % n == 0]


def _said(values: Sequence[float]) -> str:
    return ", ".join(f"{v:g}" for v in values)


def _denser_sigmas(anchors: list[float]) -> list[float]:
    """Between the anchors, the points twice as dense through the anchors' own shift.

    The shift s is that of sigma = s u / (1 + (s - 1) u) with equally spaced u.
    """
    num, times, shifts = len(anchors), even_times(len(anchors)), _shifts(anchors)
    # Within 2 %: anchors rounded to three digits are still of one shift.
    if anchors[0] != 1 or not shifts or max(shifts) > 1.02 * min(shifts):
        raise ValueError(
            f"{2 * num}: the anchors {anchors} are not one shift of equally spaced times"
        )
    shift = sum(shifts) / len(shifts)
    between = [u - 0.5 / num for u in times]
    dense = [shifted(u, shift) for u in between]
    return [sigma for pair in zip(anchors, dense, strict=True) for sigma in pair]


def one_shift(anchors: Sequence[float]) -> float | None:
    """The s by which sigmas are s u / (1 + (s - 1) u) of `even_times`; None when by no single s."""
    shifts = _shifts(anchors) or [1.0]
    mean = sum(shifts) / len(shifts)
    shift = round(mean, 4) if abs(round(mean, 4) - mean) < 1e-9 else mean
    made = [shifted(u, shift) for u in even_times(len(anchors))]
    fits = all(abs(a - b) < SAME_SIGMA for a, b in zip(anchors, made, strict=True))
    return shift if fits else None


def even_times(num: int) -> list[float]:
    """1, 1 - 1/K, ..., 1/K: the sigmas of K equal steps before any shift."""
    return [1 - step / num for step in range(num)]


def shifted(u: float, shift: float) -> float:
    """The sigma that a shift makes of u, both in [0, 1]; by 1 / shift it goes back."""
    return shift * u / (1 + (shift - 1) * u)


def _shifts(anchors: Sequence[float]) -> list[float]:
    """The shift by which each anchor below 1 comes from its equally spaced u."""
    pairs = zip(anchors, even_times(len(anchors)), strict=True)
    return [sigma * (1 - u) / (u * (1 - sigma)) for sigma, u in pairs if sigma < 1 and u < 1]


def _denser_timesteps(anchors: list[float]) -> list[float]:
    """Between the anchors, the middles; below the last, half way to -1, where no noise is left."""
    below = [*anchors[1:], -1]
    middles = [int(a + b) // 2 for a, b in zip(anchors, below, strict=True)]
    return [t for pair in zip(anchors, middles, strict=True) for t in pair]


def _are_sigmas(anchors: Sequence[float]) -> bool:
    return anchors[-1] > 0 and anchors[0] <= 1


def _are_timesteps(anchors: Sequence[float]) -> bool:
    return anchors[-1] >= 0 and anchors[0] >= 1 and all(float(a).is_integer() for a in anchors)


SIGMAS = Levels("sigmas", float, 1e-3, _are_sigmas, _denser_sigmas)
TIMESTEPS = Levels("timesteps", int, 0, _are_timesteps, _denser_timesteps)


def counted(anchors: Sequence[float]) -> tuple[float, ...]:
    """Anchors as a card keeps them: sigmas in (0, 1] as float, or timesteps as int.

    Raises ValueError when they do not fall, or are neither.
    """
    numbers = all(isinstance(a, int | float) and not isinstance(a, bool) for a in anchors)
    if anchors and numbers and all(a > b for a, b in pairwise(anchors)):
        for levels in (SIGMAS, TIMESTEPS):
            if levels.fits(anchors):
                return tuple(levels.number(a) for a in anchors)
    raise ValueError(
        f"anchors {list(anchors)} do not fall, as sigmas from 1 towards 0 or as integer timesteps"
    )
