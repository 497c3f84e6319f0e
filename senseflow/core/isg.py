"""Intra-segment guidance (ISG): the loss between two ways down a segment (SenseFlow Eq. 12), and
the teacher's error xi(t) with which the paper motivates it."""

from torch import Tensor

from senseflow.core.names import IsgLoss

CHARBONNIER_EPS = 1e-3  # of the released recipes


def isg_loss(x_direct: Tensor, x_target: Tensor, kind: IsgLoss) -> Tensor:
    """The distance of the student's one step over the segment from the guided way (Eq. 12).

    x_direct: (B, ...) at tau_{i-1}, one ODE step of the student from tau_i, with gradient.
    x_target: (B, ...) at tau_{i-1}, teacher's step to t_mid and student's step from there; no
    gradient. l2 is the paper's mean d^2; charbonnier the release's mean sqrt(d^2 + e^2) - e.
    """
    # sg: both ways hold the student, and only the direct one is to move.
    d = x_direct.float() - x_target.detach().float()
    if kind == "l2":
        return d.square().mean()
    return ((d.square() + CHARBONNIER_EPS**2).sqrt() - CHARBONNIER_EPS).mean()


def reconstruction_error(x_0: Tensor, x_0_hat: Tensor) -> Tensor:
    """What xi(t) is the mean of: ||x_0 - x_0_hat||^2 over the elements; (B, ...) -> (B,)."""
    return (x_0.float() - x_0_hat.float()).square().flatten(1).mean(1)
