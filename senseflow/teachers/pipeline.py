"""What the adapters of all families share: encoders, VAE and scheduler of a diffusers pipeline."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import DiffusionPipeline, ModelMixin
from safetensors import SafetensorError
from torch import Tensor, nn

from senseflow.common.files import read_json
from senseflow.core.guidance import guide
from senseflow.core.path import Path as NoisePath
from senseflow.teachers.encoded import Conditioning, KnownPrompts, Posterior
from senseflow.teachers.folder import TeacherSettings, encoder_classes
from senseflow.teachers.teacher import Adapter
from senseflow.teachers.text_encoders import Kinds, keep_recording, text_encoders
from senseflow.weights.meta import Blocks, Build, NetworkSource, frozen_network, open_network


def device_of(pipeline: Any) -> torch.device:
    """The encoders'; the pipeline's own properties walk through all modules to say it."""
    device: torch.device = next(pipeline.vae.parameters()).device
    return device


class LoadAdapter(Protocol):
    """Reads the adapter of a family."""

    def __call__(
        self,
        settings: TeacherSettings,
        path: NoisePath,
        device: torch.device,
        build: Build,
        known: KnownPrompts | None,
    ) -> Adapter:
        """With `known` no text encoder is read, and `encode_prompts` is not to be called."""
        ...


@dataclass(frozen=True)
class Networks:
    """What the `adapter` module of a family gives its `Family`, which says what each is."""

    load_adapter: LoadAdapter
    teacher: Callable[[TeacherSettings], NetworkSource]
    student: Callable[[TeacherSettings], NetworkSource]
    text_encoders: Kinds  # that its folders hold


@dataclass(frozen=True)
class PipelineAdapter(ABC):
    """A teacher without its denoiser: the pipeline's encoders, and its VAE both ways."""

    pipeline: Any  # a diffusers pipeline without its denoiser
    path: NoisePath
    resolution: tuple[int, int]  # height, width in pixels
    compute_dtype: torch.dtype

    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one sample at the run's resolution."""
        factor = self.pipeline.vae_scale_factor
        height, width = self.resolution
        return self.pipeline.vae.config.latent_channels, height // factor, width // factor

    @torch.no_grad()
    def encode_images(self, images: Tensor, eps: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w), drawn from the VAE's posterior of images (B, 3, H, W)."""
        return self.draw_latents(posterior_of(self.pipeline.vae, images), eps)

    def draw_latents(self, posterior: Posterior, eps: Tensor) -> Tensor:
        """(mean + std eps - shift) scale, (B, C, h, w)."""
        config, sample = self.pipeline.vae.config, posterior.mean + posterior.std * eps
        latents: Tensor = (sample - (config.shift_factor or 0)) * config.scaling_factor
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) float32, about [-1, 1], of scaled latents; differentiable."""
        vae = self.pipeline.vae
        scaled = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0)
        images: Tensor = vae.decode(scaled.to(vae.dtype), return_dict=False)[0]
        return images.float()

    @abstractmethod
    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """See `senseflow.teachers.teacher.Adapter`."""


class CfgAdapter(PipelineAdapter):
    """A teacher guided by classifier-free guidance."""

    @abstractmethod
    def null(self, cond: Conditioning) -> Conditioning:
        """The conditioning of no prompt, for as many samples as `cond`."""

    def predict_guided(
        self, teacher: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning, scale: Tensor
    ) -> Tensor:
        """uncond + scale (cond - uncond); both halves in one forward."""
        both = self.null(cond).cat(cond)
        output = self.predict(teacher, torch.cat([x_t, x_t]), torch.cat([t, t]), both)
        uncond, with_prompt = output.chunk(2)
        return guide(uncond, with_prompt, scale)


@torch.no_grad()
def posterior_of(vae: Any, images: Tensor) -> Posterior:
    """What a VAE says of images (B, 3, H, W) in [-1, 1]."""
    found = vae.encode(images.to(vae.dtype)).latent_dist
    return Posterior(found.mean.float(), found.std.float())


def load_encoders(
    pipeline_class: type[DiffusionPipeline],
    component: str,
    kinds: Kinds,
    settings: TeacherSettings,
    device: torch.device,
    build: Build,
    known: KnownPrompts | None,
) -> Any:
    """The frozen encoders, VAE and scheduler of a pipeline folder, without its denoiser.

    `build` loads the text encoders, of these kinds, one after the other; diffusers loads the rest.
    With `known` there are none.
    """
    encoders: dict[str, Any] = dict.fromkeys(encoder_classes(settings.folder))
    if known is None:
        sources = text_encoders(settings.folder, kinds, settings.compute_dtype)
        encoders |= {name: keep_recording(build(source)) for name, source in sources.items()}
    try:
        pipeline = pipeline_class.from_pretrained(
            settings.folder,
            **{component: None, **encoders},
            dtype={"vae": settings.vae_dtype, "default": settings.compute_dtype},
            local_files_only=True,
        )
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{settings.folder} is damaged: {error}") from error
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(device)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.eval().requires_grad_(False)
    return pipeline


@dataclass(frozen=True)
class PlainNetwork:
    """The network of a family whose student has the teacher's own architecture."""

    network_class: type[ModelMixin]
    component: str  # its folder in a pipeline
    blocks_of: Blocks  # the units of sharding
    repeated_of: Blocks  # those of recomputation and compilation

    def teacher(self, settings: TeacherSettings) -> NetworkSource:
        """The frozen teacher of a pipeline folder."""
        return frozen_network(self._source(settings, None), settings.compute_dtype)

    def student(self, settings: TeacherSettings) -> NetworkSource:
        """The start of student and fake score: the teacher, in float32."""
        return self._source(settings, settings.student_config)

    def _source(self, settings: TeacherSettings, config: Path | None) -> NetworkSource:
        folder = settings.folder / self.component
        tree = read_json(config or folder / "config.json")
        source, _ = open_network(self.network_class, folder, tree, self.blocks_of)
        return replace(source, repeated=self.repeated_of(source.network))
