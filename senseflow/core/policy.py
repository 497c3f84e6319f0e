"""A few-step sampler as a policy: where a step leads is a Gaussian, whose density is known.

Coefficients-preserving sampling (CPS, arXiv 2509.05952), on flow and VP paths alike.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from senseflow.core.path import Denoised, Path, over_sample


@dataclass(frozen=True)
class Transition:
    """The law N(mean, std^2 I) of x_s given x_t: mean (B, ...), std (B, 1, ..., 1), float32."""

    mean: Tensor
    std: Tensor

    def draw(self, noise: Tensor) -> Tensor:
        """x_s (B, ...) of unit Gaussian noise (B, ...)."""
        return self.mean + self.std * noise

    def log_prob(self, x_s: Tensor) -> Tensor:
        """The log-density at x_s (B, ...), in nats per element: the mean over the elements (B,).

        The gradient goes to mean alone: x_s is what was drawn, a constant. By the element, as in
        DanceGRPO (arXiv 2505.07818), so that ratios do not depend on the size of the image. Not
        finite where std is 0: at eta 0, and in the step to no noise.
        """
        # Drawn from this same law, x_s moves with mean, and the gradient would be 0.
        deviation = (x_s.detach().float() - self.mean) / self.std
        log_density = -deviation.square() / 2 - self.std.log() - math.log(2 * math.pi) / 2
        return log_density.flatten(1).mean(1)


def transition(path: Path, denoised: Denoised, s: Tensor, eta: float) -> Transition:
    """One step from a prediction at x_t to time s (B,); eta in [0, 1] is the share of fresh noise.

    x_s ~ N(alpha_s x_0 + sigma_s cos(eta pi / 2) eps, (sigma_s sin(eta pi / 2))^2 I). eta 0 is
    `ode_step`, the Euler or DDIM sampler; eta 1 is the x0 sampler, which re-noises x_0. Between
    them x_s carries the path's own noise level too, as cos^2 + sin^2 = 1 (CPS). mean has the
    gradient of the prediction. This eta is not DDIM's, whose fresh noise depends on the step.
    """
    alpha, sigma = (over_sample(a, denoised.x_0) for a in path.alpha_sigma(s))
    kept, fresh = math.cos(eta * math.pi / 2), math.sin(eta * math.pi / 2)
    return Transition(
        mean=alpha * denoised.x_0 + sigma * kept * denoised.eps,
        std=sigma * fresh,
    )
