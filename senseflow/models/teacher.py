"""What an adapter offers: everything in which one teacher family differs from another.

An adapter holds the frozen encoders, never a trained network: generator, fake score and teacher
share one signature and are arguments. Packing, position ids, the network's own time and its
guidance stay inside.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from senseflow.core.path import Path


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts: prompt_embeds (B, L, D) and pooled (B, P)."""

    prompt_embeds: Tensor
    pooled: Tensor


class Adapter(Protocol):
    """One teacher family, as the iteration sees it; latents are (B, C, h, w) float32."""

    path: Path

    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one sample at the run's resolution."""
        ...

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """Prompts to conditioning; no gradient."""
        ...

    def encode_images(self, images: Tensor, eps: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] to scaled latents, with unit noise eps; no gradient."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents to images (B, 3, H, W), about [-1, 1]; differentiable."""
        ...

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """The network's output at (x_t, t) without guidance (student, fake score), (B, C, h, w)."""
        ...

    def predict_guided(
        self, teacher: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning, scale: Tensor
    ) -> Tensor:
        """The teacher's output with guidance scale (B,), the way this family is guided."""
        ...
