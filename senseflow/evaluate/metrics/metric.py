"""What a metric is: the weights and settings its value depends on, and how an image is judged."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from PIL import Image
from torch import Tensor


@dataclass(frozen=True)
class Machine:
    """Where and in which type a model runs."""

    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True)
class Extractor:
    """Features of images, for a distance between two sets of them."""

    preprocessing: str
    load: Callable[[Image.Image], Tensor]  # one decoded image -> what the model takes, on the CPU
    features: Callable[[Tensor], Tensor]  # (B, ...) -> (B, D)


@dataclass(frozen=True)
class Scorer:
    """A number for each image and its prompt."""

    preprocessing: str
    load: Callable[[Image.Image], Tensor]
    score: Callable[[Tensor, list[str]], Tensor]  # (B, ...), B prompts -> (B,)


@dataclass(frozen=True)
class Comparer:
    """A distance between every two images of one prompt."""

    preprocessing: str
    load: Callable[[Image.Image], Tensor]
    distances: Callable[[Tensor], Tensor]  # (S, ...) -> (S (S - 1) / 2,)


Opened = TypeVar("Opened", Extractor, Scorer, Comparer, covariant=True)


@dataclass(frozen=True)
class Metric(Generic[Opened]):
    """A metric before its model is loaded: all that tells whether a result still holds."""

    name: str
    model: str
    weights: list[Path]
    settings: dict[str, Any]
    open: Callable[[Machine], Opened]
