"""How every embedded teacher learns: latents of fresh pictures, captions sometimes dropped.

A teacher under training (`Learner`) is one module that holds its diffusion network and its text
encoders, which learn together; it says its own loss. Everything else is the same for all families.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from tqdm import tqdm

from senseflow.tiny.captions import ATTRIBUTES, BACKGROUNDS, captions_of, split_scenes
from senseflow.tiny.fitting import fit
from senseflow.tiny.pictures import draw_scenes, render
from senseflow.tiny.text import Text
from senseflow.tiny.vae import encode_images

PROMPT_DROP = 0.1
TIME_SHIFT = 1.8  # of the flows


@dataclass(frozen=True)
class Lesson:
    """How long a network is trained, how fast, on how many cached pictures."""

    iterations: int
    learning_rate: float
    num_pictures: int
    dark_weight: int
    seed: int
    batch_size: int = 128


class Learner(nn.Module, ABC):
    """A diffusion network with its text encoders, as the lesson sees them."""

    text: Text

    @abstractmethod
    def loss(
        self, x_0: Tensor, eps: Tensor, u: Tensor, ids: list[Tensor], dropped: Tensor
    ) -> Tensor:
        """The denoising loss of latents x_0 (B, C, h, w) at times drawn from u (B,) in [0, 1).

        dropped: (B,) bool, the samples that are to be predicted without their caption.
        """
        ...

    def encode(self, vae: Any, images: Tensor) -> Tensor:
        """Latents (B, C, h, w) of images (B, 3, 32, 32) as its network sees them."""
        return encode_images(vae, images)

    @abstractmethod
    def pipeline(self, vae: Any) -> DiffusionPipeline:
        """The stock pipeline that draws with it, to be saved."""
        ...


L = TypeVar("L", bound=Learner)


@torch.no_grad()
def cache_latents(
    encode: Callable[[Tensor], Tensor], num: int, dark_weight: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Latents (num, C, h, w) of fresh training pictures, and their scenes (num, 6).

    Digits on black have little contrast, so little weight in a squared error: they are drawn
    `dark_weight` times as often as the others.
    """
    pool = split_scenes()[0]
    is_dark = pool[:, ATTRIBUTES.index("background")] == BACKGROUNDS.index("black")
    pool = torch.cat([pool, *[pool[is_dark]] * (dark_weight - 1)])
    scenes = draw_scenes(pool, num, generator)
    chunks = tqdm(scenes.split(250), desc="latents", mininterval=10, dynamic_ncols=True)
    return torch.cat([encode(render(c, generator)) for c in chunks]), scenes


def flow_at(x_0: Tensor, eps: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Sigma (B,) of a flow at uniform u in [0, 1), and its x_t.

    More of the noisy times, at which it is decided what is where.
    """
    sigma = TIME_SHIFT * u / (1 + (TIME_SHIFT - 1) * u)
    return sigma, torch.lerp(x_0, eps, sigma[:, None, None, None])


def without_dropped(ids: list[Tensor], empty: list[Tensor], dropped: Tensor) -> list[Tensor]:
    """Token ids (B, L) of each tokenizer, those of the dropped (B,) samples replaced by `empty`."""
    return [torch.where(dropped[:, None], e, i) for e, i in zip(empty, ids, strict=True)]


class Examples:
    """Random training batches of cached latents, with their token ids, noise and time."""

    def __init__(self, vae: Any, learner: Learner, lesson: Lesson) -> None:
        self.generator = torch.Generator().manual_seed(lesson.seed)
        self.num = lesson.batch_size
        self.latents, scenes = cache_latents(
            partial(learner.encode, vae), lesson.num_pictures, lesson.dark_weight, self.generator
        )
        self.tokens = learner.text.tokenize(captions_of(scenes))

    def draw(self, drop: float) -> tuple[Tensor, Tensor, Tensor, list[Tensor], Tensor]:
        """x_0 and eps (B, C, h, w), u (B,), one tensor of ids per tokenizer, dropped (B,)."""
        num, generator = self.num, self.generator
        index = torch.randint(len(self.latents), (num,), generator=generator)
        eps = torch.randn(self.latents[index].shape, generator=generator)
        # One stratum of time per sample.
        u = (torch.arange(num) + torch.rand(num, generator=generator)) / num
        dropped = torch.rand(num, generator=generator) < drop
        return self.latents[index], eps, u, [tokens[index] for tokens in self.tokens], dropped


def teach(vae: Any, learner: L, lesson: Lesson) -> tuple[L, dict[str, float]]:
    """Train a learner; returns the moving average of its weights, and the figures."""
    examples = Examples(vae, learner, lesson)

    def loss_of(_: int) -> Tensor:
        return learner.loss(*examples.draw(PROMPT_DROP))

    (learner,), loss = fit(
        loss_of, [learner], lesson.iterations, lesson.learning_rate, "teach", average_decay=0.9985
    )
    return learner, {"loss": loss}
