"""The teacher's one-step reconstruction error xi(t), with which SenseFlow motivates ISG, and times
drawn with a density proportional to it."""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


def reconstruction_error(x_0: Tensor, x_0_hat: Tensor) -> Tensor:
    """Mean of (x_0 - x_0_hat)^2 over the elements of each sample; (B, ...) -> (B,)."""
    return (x_0.float() - x_0_hat.float()).square().flatten(1).mean(1)


@dataclass(frozen=True)
class ErrorCurve:
    """xi >= 0 at rising times (thousandths), and the straight lines between them.

    Raises ValueError for fewer than two times, times that do not rise, and errors that are
    negative or not finite.
    """

    times: tuple[float, ...]
    errors: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.times) != len(self.errors) or len(self.times) < 2:
            raise ValueError(f"{len(self.times)} times and {len(self.errors)} errors are no curve")
        if any(not a < b for a, b in pairwise(self.times)):
            raise ValueError(f"times must rise, got {list(self.times)}")
        bad = [xi for xi in self.errors if not (math.isfinite(xi) and xi >= 0)]
        if bad:
            raise ValueError(f"errors must be finite and not negative, got {bad[0]}")

    def require(self, low: float, high: float) -> None:
        """Raise ValueError unless times can be drawn in (low, high): it is covered, xi not 0."""
        if low < self.times[0] or high > self.times[-1]:
            raise ValueError(
                f"the curve from {self.times[0]:g} to {self.times[-1]:g} does not cover "
                f"{low:g} to {high:g} (thousandths)"
            )
        if not self._between(low, high)[1].any():
            raise ValueError(f"the curve is 0 from {low:g} to {high:g} (thousandths)")

    def quantile(self, u: Tensor, low: float, high: float) -> Tensor:
        """Times (B,) in [low, high] with density proportional to xi, from u (B,) in [0, 1).

        The inverse of the cumulative of the lines, which is quadratic on each piece: with error y
        and slope m at a piece's start, y s + m s^2 / 2 = r gives s = 2 r / (y + sqrt(y^2 + 2 m r)).
        Exact up to the rounding of float64, then of u's type. u on the CPU.
        """
        t, y = self._between(low, high)
        width = t.diff()
        slope = y.diff() / width
        pieces = (y[1:] + y[:-1]) / 2 * width
        cumulative = torch.cat([pieces.new_zeros(1), pieces.cumsum(0)])
        area = u.double() * cumulative[-1]
        k = (torch.searchsorted(cumulative, area, right=True) - 1).clamp(0, len(pieces) - 1)
        r = area - cumulative[k]
        root = (y[k].square() + 2 * slope[k] * r).clamp_min(0).sqrt()
        s = torch.where(r > 0, 2 * r / (y[k] + root), 0)
        return (t[k] + s.minimum(width[k])).to(u.dtype)

    def _between(self, low: float, high: float) -> tuple[Tensor, Tensor]:
        """The knots in [low, high] and xi there, float64; the ends are knots."""
        t, y = (torch.tensor(a, dtype=torch.float64) for a in (self.times, self.errors))
        ends = torch.tensor([low, high], dtype=torch.float64)
        right = torch.searchsorted(t, ends).clamp(1, len(t) - 1)
        left = right - 1
        at_ends = torch.lerp(y[left], y[right], (ends - t[left]) / (t[right] - t[left]))
        inside = (t > low) & (t < high)
        return (
            torch.cat([ends[:1], t[inside], ends[1:]]),
            torch.cat([at_ends[:1], y[inside], at_ends[1:]]),
        )
