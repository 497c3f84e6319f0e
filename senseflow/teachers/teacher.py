"""What a teacher family offers: its adapter, its networks, and what it requires of a folder.

An adapter holds the frozen encoders, never a trained network: generator, fake score and teacher
share one signature and are arguments. Packing, position and time ids, the network's own time and
the way it is guided stay inside.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from senseflow.core.anchors import Anchors
from senseflow.core.path import Path as NoisePath
from senseflow.teachers.encoded import Conditioning, KnownPrompts, Posterior
from senseflow.weights.lora import LoraSettings
from senseflow.weights.meta import Build, NetworkSource


def sigmas_of(path: NoisePath, anchors: Anchors) -> tuple[float, ...]:
    """The noise levels of flow anchors, in (0, 1]."""
    _, sigma = path.alpha_sigma(torch.tensor(anchors.times))
    return tuple(sigma.tolist())


class Adapter(Protocol):
    """One teacher family, as the iteration sees it; latents are (B, C, h, w) float32."""

    @property
    def pipeline(self) -> Any:
        """The diffusers pipeline without its denoiser."""
        ...

    @property
    def path(self) -> NoisePath:
        """The noise path, with the clock that all times of the iteration are read on."""
        ...

    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one sample at the run's resolution."""
        ...

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """Prompts to conditioning; no gradient."""
        ...

    def encode_images(self, images: Tensor, eps: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] to scaled latents, with unit noise eps; no gradient."""
        ...

    def draw_latents(self, posterior: Posterior, eps: Tensor) -> Tensor:
        """The scaled latents of encoded images, with unit noise eps (0: the mean)."""
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


@dataclass(frozen=True)
class TeacherSettings:
    """What the configuration of a run tells a family of its teacher and student."""

    folder: Path  # the teacher's diffusers pipeline
    resolution: tuple[int, int]  # height, width in pixels
    max_sequence_length: int | None  # T5 tokens
    shift: float | None  # of the anchors' times; None: the scheduler's own
    compute_dtype: torch.dtype
    vae_dtype: torch.dtype
    student_config: Path | None = None  # config.json of the student; None: the teacher's
    linked: Path | None = None  # folder with links to the teacher's weights (FLUX)
    fold_guidance: float | None = None  # FLUX
    guidance: float | None = None  # FLUX: the constant fed to a LoRA student's embedding
    lora: LoraSettings | None = None  # None: student and fake score are networks of their own


class LoadAdapter(Protocol):
    """Reads the adapter of a family."""

    def __call__(
        self,
        settings: TeacherSettings,
        device: torch.device,
        build: Build,
        known: KnownPrompts | None = None,
    ) -> Adapter:
        """With `known` no text encoder is read, and `encode_prompts` is not to be called."""
        ...


@dataclass(frozen=True)
class TeacherFamily:
    """One architecture of teachers; `senseflow.trainer` names the one of each recipe."""

    name: str  # on the cards of students
    component: str  # the trained part's folder in a pipeline
    require: Callable[[TeacherSettings], None]  # raises ValueError; reads no weights
    path: Callable[[TeacherSettings], NoisePath]  # of the folder's scheduler
    anchors: Callable[[TeacherSettings, tuple[float, ...]], Anchors]  # of times before any shift
    sampled_at: Callable[[NoisePath, Anchors], tuple[float, ...]]  # the anchors on a student's card
    load_adapter: LoadAdapter
    teacher: Callable[[TeacherSettings], NetworkSource]
    student: Callable[[TeacherSettings], NetworkSource]
    bottleneck: Callable[[TeacherSettings], tuple[int, int, int]] | None = None  # (C, h, w), UNets
    null_prompt: str | None = None  # whose encoding is that of no prompt; None: none is encoded
