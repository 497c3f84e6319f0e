"""Noise paths x_t = alpha_t x_0 + sigma_t eps, and what a network's output says about x_0 and eps.

Both teacher families share every equation of the method through the pair (alpha_t, sigma_t):
`FlowPath` (SD3.5, FLUX: alpha = 1 - sigma, the network predicts v = eps - x_0) and `VPPath`
(SDXL: alpha = sqrt(abar_t), sigma = sqrt(1 - abar_t), the network predicts eps).

Time is a float32 tensor t of shape (B,) on the family's own clock, in thousandths: SDXL's integer
step, 1000 times FLUX's sigma, SD3.5's index before its shift. Everything here is float32 or wider.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Denoised:
    """One prediction at x_t, read as both ends of the path; (B, ...) each, float32."""

    x_0: Tensor
    eps: Tensor


def over_sample(values: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, ..., 1), to broadcast over samples shaped as `like` (B, ...)."""
    return values.view(-1, *([1] * (like.dim() - 1)))


@dataclass(frozen=True)
class FlowPath:
    """The straight path of SD3.5 and FLUX: alpha = 1 - sigma; the network predicts v = eps - x_0.

    shift: sigma = shift * u / (1 + (shift - 1) * u) with u = t / 1000. FLUX's clock is sigma itself
    (shift 1); SD3.5's is the unshifted index (shift 3).
    """

    shift: float = 1.0
    clean: float = 0.0  # the clock at no noise, where the lowest segment ends
    noisiest: float = 1000.0  # its highest reading

    def put_on(self, device: torch.device) -> None:
        """Nothing: it is a formula, and no table."""

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t (B,) at the clock t (B,): 1 - sigma and sigma, shifted."""
        # Here alone: laws of t, margins and anchors are read on the clock, before the shift.
        sigma = shift_sigma(t.float() / 1000, self.shift)
        return 1 - sigma, sigma

    def target(self, x_0: Tensor, eps: Tensor) -> Tensor:
        """The velocity eps - x_0, which the network is trained to output; in the shape of x_0."""
        return eps - x_0

    def read(self, output: Tensor, x_t: Tensor, t: Tensor) -> Denoised:
        """x_0 = x_t - sigma v and eps = x_t + alpha v of a predicted v (B, ...), float32."""
        alpha, sigma = (over_sample(a, x_t) for a in self.alpha_sigma(t))
        v, x_t = output.float(), x_t.float()
        # x_t = alpha x_0 + sigma eps and v = eps - x_0, solved for both (alpha + sigma is 1).
        return Denoised(x_0=x_t - sigma * v, eps=x_t + alpha * v)


class VPPath:
    """SDXL's variance preserving path over integer steps; the network predicts eps.

    alphas_cumprod: (T,) abar_t. The clock reads -1 at exactly no noise, because step 0 of such a
    schedule already carries a little.
    """

    clean: float = -1.0

    def __init__(self, alphas_cumprod: Tensor) -> None:
        self.noisiest = float(len(alphas_cumprod) - 1)
        abar = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod.double().cpu()])
        self.tables = {abar.device: abar}

    def put_on(self, device: torch.device) -> None:
        """Have the table on a device: where it is copied when it is asked for, the host waits."""
        if device not in self.tables:
            self.tables[device] = next(iter(self.tables.values())).to(device)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t (B,) at t (B,), from the table's nearest whole step, float32."""
        self.put_on(t.device)
        # One on: the table begins at no noise, which the clock calls -1.
        abar = self.tables[t.device][t.round().long() + 1]
        # In float64 up to here: of the first steps 1 - abar would lose digits in float32.
        return abar.sqrt().float(), (1 - abar).sqrt().float()

    def target(self, x_0: Tensor, eps: Tensor) -> Tensor:
        """The noise itself, which the network is trained to output."""
        return eps

    def read(self, output: Tensor, x_t: Tensor, t: Tensor) -> Denoised:
        """eps as predicted, and x_0 = (x_t - sigma eps) / alpha, float32."""
        alpha, sigma = (over_sample(a, x_t) for a in self.alpha_sigma(t))
        eps = output.float()
        # alpha is .07 at step 999: an error in eps is 14 times as large in x_0.
        return Denoised(x_0=(x_t.float() - sigma * eps) / alpha, eps=eps)


Path = FlowPath | VPPath


def add_noise(path: Path, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """The forward process x_t = alpha_t x_0 + sigma_t eps; x_0, eps (B, ...), t (B,)."""
    alpha, sigma = (over_sample(a, x_0) for a in path.alpha_sigma(t))
    return alpha * x_0.float() + sigma * eps.float()


def ode_step(path: Path, denoised: Denoised, s: Tensor) -> Tensor:
    """One step of the probability flow ODE to time s (B,): x_s = alpha_s x_0 + sigma_s eps.

    On the flow path this is Euler's x_t + (sigma_s - sigma_t) v; on the VP path DDIM with eta 0.
    """
    # Both ends of one prediction: with fresh eps it would be another process, and no ODE.
    return add_noise(path, denoised.x_0, denoised.eps, s)


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """Constant shift s of a noise level in [0, 1]: s sigma / (1 + (s - 1) sigma) (SD3, Eq. 23).

    FLUX's exponential shift with mu is the constant shift exp(mu).
    """
    return shift * sigma / (1 + (shift - 1) * sigma)
