"""The adversarial losses: hinge with the anchor's weight omega (SenseFlow Eqs. 13-15), and DMD2's
non-saturating ones."""

import torch
from torch import Tensor
from torch.nn import functional as F

from senseflow.core.path import Path


def omega(path: Path, tau: Tensor, power: float = 2.0) -> Tensor:
    """omega(tau) = alpha_tau^2 at the student's input anchor, (B,) (Eq. 15).

    0 at the top anchor of flow teachers, where the input carries nothing of the image. `power` 1 is
    what the released SDXL recipe uses.
    """
    alpha, _ = path.alpha_sigma(tau)
    return alpha**power


def hinge_discriminator_loss(real: Tensor, fake: Tensor, weight: Tensor) -> Tensor:
    """mean omega [relu(1 - D(real)) + relu(1 + D(fake))]; logits (B, L), weight (B,) (Eq. 13)."""
    # Every place of every head counts alike within a sample; omega weighs the samples.
    per_sample = F.relu(1 - real.float()).mean(1) + F.relu(1 + fake.float()).mean(1)
    return (weight * per_sample).mean()


def hinge_generator_loss(fake: Tensor, weight: Tensor) -> Tensor:
    """-mean omega D(fake); logits (B, L), weight (B,) (Eq. 14)."""
    # Without the hinge: x goes on learning where the heads are already fooled.
    return -(weight * fake.float().mean(1)).mean()


def softplus_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """mean softplus(D(fake)) + softplus(-D(real)); logits (B, L), 0-d (DMD2, Section 4.3)."""
    return F.softplus(fake.float()).mean() + F.softplus(-real.float()).mean()


def softplus_generator_loss(fake: Tensor) -> Tensor:
    """mean softplus(-D(fake)); logits (B, L), 0-d (DMD2, Section 4.3)."""
    return F.softplus(-fake.float()).mean()


@torch.no_grad()
def margin(real: Tensor, fake: Tensor) -> Tensor:
    """mean D(real) - mean D(fake): how well the heads tell them apart; 2 ends the hinge's pull."""
    return real.float().mean() - fake.float().mean()
