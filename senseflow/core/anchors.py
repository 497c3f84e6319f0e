"""The anchors tau_K > ... > tau_1 the student is trained at, their segments, and the laws of t.

All times are on the path's clock, in thousandths (see `senseflow.core.path`).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from senseflow.core.names import TimeLaw


@dataclass(frozen=True)
class Anchors:
    """K anchor times from the noisiest to the cleanest, and `end`, the clock at no noise."""

    times: tuple[float, ...]
    end: float = 0.0

    def __post_init__(self) -> None:
        if not self.times:
            raise ValueError("anchors: at least one time is needed")
        if any(a <= b for a, b in zip(self.times, (*self.times[1:], self.end), strict=True)):
            raise ValueError(f"anchors must fall from noisy to clean, got {list(self.times)}")

    def __len__(self) -> int:
        return len(self.times)

    def of_walk(self, steps: int) -> "Anchors":
        """Those of sampling in so many steps, a divisor of K: evenly spread from the first one."""
        return Anchors(self.times[:: len(self) // steps], self.end)

    def segment(self, index: int) -> tuple[float, float]:
        """The segment (tau_{i-1}, tau_i] below anchor `index` (0 is the noisiest)."""
        # Below the last anchor lies exactly no noise, where the sampler's last step ends.
        return (*self.times, self.end)[index + 1], self.times[index]

    def midpoint(self, index: int, margin: float, u: Tensor) -> Tensor:
        """ISG's t_mid (B,), uniform between the segment's margins, for u (B,) in [0, 1)."""
        low, high = self.segment(index)
        # Uniform: by the teacher's error curve it made no difference (docs/ablation.md).
        return low + margin + u * (high - low - 2 * margin)

    def check_margin(self, margin: float) -> None:
        """Raise ValueError when a segment has no room for a mid-point between its margins."""
        for index in range(len(self)):
            low, high = self.segment(index)
            if high - low <= 2 * margin:
                raise ValueError(
                    f"isg.margin {margin:g} leaves no mid-point between the anchors {high:g} and "
                    f"{low:g} (thousandths); it must be below {(high - low) / 2:g}"
                )


def shift_time(t: float, shift: float) -> float:
    """The constant shift of `senseflow.core.path.shift_sigma` for one clock time in thousandths."""
    u = t / 1000
    return 1000 * (shift * u / (1 + (shift - 1) * u))  # exactly 1000 at 1000


def exponential_shift(mu: float) -> float:
    """FLUX's dynamic shift exp(mu) / (exp(mu) + 1 / sigma - 1), as a constant shift."""
    return math.exp(mu)


def dynamic_mu(
    num_tokens: int, base_tokens: int, max_tokens: int, base_shift: float, max_shift: float
) -> float:
    """mu of FLUX's resolution-dependent shift: linear in the number of image tokens."""
    slope = (max_shift - base_shift) / (max_tokens - base_tokens)
    return base_shift + slope * (num_tokens - base_tokens)


def draw_time(law: TimeLaw, u: Tensor, low: float, high: float) -> Tensor:
    """Times t (B,) on the clock from uniforms u (B,) in [0, 1).

    uniform: in [low, high]; logit_normal: 1000 sigmoid(n) with n ~ N(0, 1), clipped to [low, high].
    """
    if law == "uniform":
        return low + u * (high - low)
    # In float64, whose neighbours of 0 and 1 are far nearer: ndtri is infinite at both.
    normal = torch.special.ndtri(u.double().clamp(1e-9, 1 - 1e-9))
    return (1000 * torch.sigmoid(normal)).float().clamp(low, high)


def draw_range(low: float, high: float, u: Tensor) -> Tensor:
    """Uniform in [low, high) from u (B,) in [0, 1): guidance scales."""
    return low + u * (high - low)
