"""Distribution matching (DMD): the generator's gradient, and the fake score's own loss."""

from torch import Tensor

from senseflow.core.path import Path, over_sample


def kl_gradient(path: Path, x_0_fake: Tensor, x_0_real: Tensor, t: Tensor) -> Tensor:
    """The exact gradient of KL(p_fake,t || p_real,t) with respect to the sample x (B, ...).

    Tweedie's score is s = (alpha x_0_hat - x_t) / sigma^2, so s_fake - s_real =
    alpha / sigma^2 (x_0_fake - x_0_real); x_t depends on x through alpha (DMD, Eq. 7).
    """
    alpha, sigma = (over_sample(a, x_0_fake) for a in path.alpha_sigma(t))
    return alpha.square() / sigma.square() * (x_0_fake - x_0_real)


def dmd_gradient(x: Tensor, x_0_fake: Tensor, x_0_real: Tensor, floor: float = 1e-4) -> Tensor:
    """DMD's normalised gradient (x_0_fake - x_0_real) / mean |x - x_0_real|, per sample.

    x, x_0_fake, x_0_real: (B, ...). It has the direction of `kl_gradient` and a scale that does
    not depend on t (DMD, Eq. 8). The mean is clamped from below by `floor`, so that a sample that
    equals the teacher's prediction has a finite gradient.
    """
    # Per sample: of the whole batch, a sample far from the teacher would shrink the others' steps.
    size = (x.float() - x_0_real).abs().flatten(1).mean(1).clamp_min(floor)
    return (x_0_fake - x_0_real) / over_sample(size, x)


def dmd_loss(x: Tensor, gradient: Tensor) -> Tensor:
    """0.5 mean (x - sg(x - g))^2: a loss whose gradient with respect to x is g / numel."""
    x = x.float()
    # The target is a constant, so that autograd finds x - (x - g) = g and nothing behind g.
    target = (x - gradient).detach()
    return 0.5 * (x - target).square().mean()


def fake_score_loss(output: Tensor, x_0: Tensor, eps: Tensor, path: Path) -> Tensor:
    """Denoising loss of f_phi on the student's samples x_0, in the network's own prediction.

    Flow: mean (v_hat - (eps - x_0))^2; VP: mean (eps_hat - eps)^2. x_0 carries no gradient.
    """
    # In the network's own prediction, so that each t weighs what it did for the teacher.
    return (output.float() - path.target(x_0.detach().float(), eps)).square().mean()
