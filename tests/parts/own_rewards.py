"""Rewards as a user writes them: `module:function`, images in [0, 1] and prompts to scores."""

from functools import cache

import torch
from torch import Tensor, nn


def brightness(images: Tensor, prompts: list[str]) -> Tensor:
    """The mean of an image; not said to be differentiable."""
    return images.mean((1, 2, 3))


def redness(images: Tensor, prompts: list[str]) -> Tensor:
    """How much redder than green."""
    return (images[:, 0] - images[:, 1]).mean((1, 2))


redness.differentiable = True


def as_bright_as_asked(images: Tensor, prompts: list[str], *, fields: list[dict]) -> Tensor:
    """By the column `wanted` of a table of prompts."""
    wanted = torch.tensor([row["wanted"] for row in fields])
    return -(images.mean((1, 2, 3)) - wanted).abs()


@cache
def network() -> nn.Module:
    """A frozen one, of few weights."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 8 * 8, 1)
    return nn.Sequential(*layers).eval().requires_grad_(False)


def seen(images: Tensor, prompts: list[str]) -> Tensor:
    """By a network."""
    return network()(images)[:, 0]


seen.differentiable = True


def nan_later(images: Tensor, prompts: list[str]) -> Tensor:
    """NaN from the second time on that it is asked."""
    nan_later.asked = getattr(nan_later, "asked", 0) + 1
    return images.mean((1, 2, 3)) * (1 if nan_later.asked < 2 else float("nan"))
