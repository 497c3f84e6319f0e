"""One family of teachers as the iteration sees it: frozen encoders, and how a network is called.

An adapter holds the frozen encoders, never a trained network: generator, fake score and teacher
share one signature and are arguments. Packing, position and time ids, the network's own time, the
sign of its output and the way it is guided stay inside.
"""

from typing import Any, Protocol

from torch import Tensor, nn

from senseflow.core.path import Path as NoisePath
from senseflow.teachers.encoded import Conditioning, Posterior


class Adapter(Protocol):
    """One teacher family in the iteration; latents are (B, C, h, w) float32, normalised."""

    @property
    def pipeline(self) -> Any:
        """The diffusers pipeline without its denoiser."""
        ...

    @property
    def path(self) -> NoisePath:
        """The noise path, with the clock that all times of the iteration are read on."""
        ...

    @property
    def unguided(self) -> float | None:
        """The scale at which guidance leaves the prompt's own prediction; None: at no scale."""
        ...

    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one sample at the run's resolution."""
        ...

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """Prompts to conditioning; no gradient."""
        ...

    def encode_images(self, images: Tensor) -> Posterior:
        """What the VAE says of images (B, 3, H, W) in [-1, 1]; no gradient."""
        ...

    def draw_latents(self, posterior: Posterior, eps: Tensor) -> Tensor:
        """The latents of encoded images, with unit noise eps as large as the mean (0: the mean)."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Latents to images (B, 3, H, W), about [-1, 1]; differentiable."""
        ...

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """The network's output at (x_t, t) without guidance (student, fake score), (B, C, h, w).

        It is what `path` reads: a network that counts time backwards, or predicts with the other
        sign, is turned round here.
        """
        ...

    def predict_guided(
        self, teacher: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning, scale: Tensor
    ) -> Tensor:
        """The teacher's output, guided as the family's pipeline does it.

        scale (B,): the pipeline's own number, its `guidance_scale`; so are dmd.guidance and
        isg.guidance in a configuration, and --guidance of a script.
        """
        ...
