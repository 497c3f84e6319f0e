"""Classifier-free guidance of the teacher."""

from torch import Tensor

from senseflow.core.path import over_sample


def guide(uncond: Tensor, cond: Tensor, scale: Tensor) -> Tensor:
    """uncond + w (cond - uncond), for network outputs (B, ...) and w (B,); w = 1 is no guidance.

    This is the scale of diffusers' pipelines (Ho and Salimans' w is one less).
    """
    w = over_sample(scale, cond)
    # In float32: a large w multiplies the rounding of two outputs that are nearly one.
    return uncond.float() + w * (cond.float() - uncond.float())
