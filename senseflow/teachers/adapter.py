"""A teacher as the iteration sees it: frozen encoders, and how a network is called.

An adapter holds the frozen encoders, never a trained network: generator, fake score and teacher
share one signature and are arguments. Packing, position and time ids, the network's own time, the
sign of its output and the way it is guided stay inside.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ModelMixin
from safetensors import SafetensorError
from torch import Tensor, nn

from senseflow.common.files import read_json
from senseflow.core.guidance import guide
from senseflow.core.path import Path as NoisePath
from senseflow.teachers.encoded import Conditioning, KnownPrompts, Posterior
from senseflow.teachers.folder import TeacherSettings, encoder_classes
from senseflow.teachers.text_encoders import Kinds, keep_recording, text_encoders
from senseflow.weights.meta import Blocks, Build, NetworkSource, frozen_network, open_network


def device_of(pipeline: Any) -> torch.device:
    """The encoders'; the pipeline's own properties walk through all modules to say it."""
    device: torch.device = next(pipeline.vae.parameters()).device
    return device


@dataclass(frozen=True)
class Adapter(ABC):
    """One teacher in the iteration, without its denoiser: latents are (B, C, h, w) float32."""

    pipeline_class: ClassVar[type[DiffusionPipeline]]
    component: ClassVar[str]  # its denoiser's
    text_encoders: ClassVar[Kinds]  # that its folders hold
    vae_class: ClassVar[type[ModelMixin]] = AutoencoderKL

    pipeline: Any  # a diffusers pipeline without its denoiser
    path: NoisePath  # with the clock that all times of the iteration are read on
    shape: tuple[int, int, int]  # (C, h, w) of one sample
    settings: TeacherSettings

    @classmethod
    def load(
        cls,
        settings: TeacherSettings,
        path: NoisePath,
        shape: tuple[int, int, int],
        device: torch.device,
        build: Build,
        known: KnownPrompts | None,
    ) -> Self:
        """Read the frozen encoders, VAE and scheduler of a pipeline folder, not its denoiser.

        `build` loads the text encoders, one after the other; diffusers loads the rest. With `known`
        there are none, and `encode_prompts` is not to be called.
        """
        folder, dtype = settings.folder, settings.compute_dtype
        encoders: dict[str, Any] = dict.fromkeys(encoder_classes(folder))
        if known is None:
            sources = text_encoders(folder, cls.text_encoders, dtype)
            encoders |= {name: keep_recording(build(source)) for name, source in sources.items()}
        try:
            # Without the denoiser: its weights are read by rows, into shards.
            pipeline: Any = cls.pipeline_class.from_pretrained(
                folder,
                **{cls.component: None, **encoders},
                dtype={"vae": settings.vae_dtype, "default": dtype},
                local_files_only=True,
            )
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(f"{folder} is damaged: {error}") from error
        pipeline.set_progress_bar_config(disable=True)
        pipeline.to(device)
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                part.eval().requires_grad_(False)
        return cls(pipeline, path, shape, settings)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The type in which networks are called."""
        return self.settings.compute_dtype

    @property
    def unguided(self) -> float | None:
        """The scale at which guidance leaves the prompt's own prediction; None: at no scale."""
        return None

    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one sample at the run's resolution."""
        return self.shape

    def encode_images(self, images: Tensor) -> Posterior:
        """What the VAE says of images (B, 3, H, W) in [-1, 1]."""
        return self.posterior_of(self.pipeline.vae, images)

    @staticmethod
    @torch.no_grad()
    def posterior_of(vae: Any, images: Tensor) -> Posterior:
        """What a VAE of this family says of images (B, 3, H, W) in [-1, 1]."""
        found = vae.encode(images.to(vae.dtype)).latent_dist
        return Posterior(found.mean.float(), found.std.float())

    def draw_latents(self, posterior: Posterior, eps: Tensor) -> Tensor:
        """Normalised latents of encoded images, with unit noise eps as large as the mean."""
        return self.normalise(posterior.mean + posterior.std * eps)

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) float32, about [-1, 1], of latents (B, C, h, w); differentiable."""
        vae = self.pipeline.vae
        images: Tensor = vae.decode(self.denormalise(latents).to(vae.dtype), return_dict=False)[0]
        return images.float()

    def normalise(self, encoded: Tensor) -> Tensor:
        """The VAE's own latents as the network sees them: (z - shift) scale."""
        config = self.pipeline.vae.config
        latents: Tensor = (encoded - (config.shift_factor or 0)) * config.scaling_factor
        return latents

    def denormalise(self, latents: Tensor) -> Tensor:
        """The network's latents as the VAE's own: z / scale + shift."""
        config = self.pipeline.vae.config
        encoded: Tensor = latents / config.scaling_factor + (config.shift_factor or 0)
        return encoded

    @abstractmethod
    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """The pipeline's own encoding of prompts, without gradient.

        Encoders on the meta device are asked for its shapes: no number, as of a mask, is there.
        """

    @abstractmethod
    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """The network's output at (x_t, t) without guidance (student, fake score), (B, C, h, w).

        It is what `path` reads: a network that counts time backwards, or predicts with the other
        sign, is turned round here.
        """

    @abstractmethod
    def predict_guided(
        self, teacher: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning, scale: Tensor
    ) -> Tensor:
        """The teacher's output, guided as the family's pipeline does it.

        scale (B,): the pipeline's own number, its `guidance_scale`; so are dmd.guidance and
        isg.guidance in a configuration, and --guidance of a script.
        """


class CfgAdapter(Adapter):
    """A teacher guided by classifier-free guidance."""

    @property
    def unguided(self) -> float | None:
        """The scale at which `guide` leaves the prompt's own prediction."""
        return 1.0

    @abstractmethod
    def null(self, cond: Conditioning) -> Conditioning:
        """The conditioning of no prompt, for as many samples as `cond`."""

    def guide(self, uncond: Tensor, cond: Tensor, scale: Tensor) -> Tensor:
        """The pipeline's own guidance: uncond + scale (cond - uncond).

        A family whose pipeline counts from 0 (cond + w (cond - uncond)), or rescales what comes
        out, says so here, and where it is off in `unguided`.
        """
        return guide(uncond, cond, scale)

    def predict_guided(
        self, teacher: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning, scale: Tensor
    ) -> Tensor:
        """`guide` of the predictions without and with the prompt, both in one forward."""
        both = self.null(cond).cat(cond)
        # At a scale of 1 too: a rank that left out a half would hang those that do not.
        output = self.predict(teacher, torch.cat([x_t, x_t]), torch.cat([t, t]), both)
        uncond, with_prompt = output.chunk(2)
        return self.guide(uncond, with_prompt, scale)


@dataclass(frozen=True)
class NullPromptAdapter(CfgAdapter):
    """A teacher guided against a prompt of its own, `null_prompt` of its `Family`."""

    null_prompt: ClassVar[str] = ""

    empty: Conditioning | None = None  # its encoding, B = 1

    @classmethod
    def load(
        cls,
        settings: TeacherSettings,
        path: NoisePath,
        shape: tuple[int, int, int],
        device: torch.device,
        build: Build,
        known: KnownPrompts | None,
    ) -> Self:
        """Read the frozen encoders; encode the null prompt once, or take it from `known`."""
        adapter = super().load(settings, path, shape, device, build, known)
        if known is None:
            return replace(adapter, empty=adapter.encode_prompts([cls.null_prompt]))
        empty = known.conditioning(cls.null_prompt).map(lambda tensor: tensor.to(device))
        return replace(adapter, empty=empty)

    def null(self, cond: Conditioning) -> Conditioning:
        """The null prompt's encoding, as the teacher was trained."""
        assert self.empty is not None
        return self.empty.expand(len(cond))


@dataclass(frozen=True)
class Networks:
    """What the `adapter` module of a family gives: the student starts as the teacher."""

    adapter: type[Adapter]
    network_class: type[ModelMixin]
    blocks_of: Blocks  # the units of sharding
    repeated_of: Blocks  # those of recomputation and compilation

    def teacher(self, settings: TeacherSettings) -> NetworkSource:
        """The frozen teacher of a pipeline folder."""
        return frozen_network(self._source(settings, None), settings.compute_dtype)

    def student(self, settings: TeacherSettings) -> NetworkSource:
        """The start of student and fake score: the teacher, in float32."""
        return self._source(settings, settings.student_config)

    def _source(self, settings: TeacherSettings, config: Path | None) -> NetworkSource:
        folder = settings.folder / self.adapter.component
        tree = read_json(config or folder / "config.json")
        source, _ = open_network(self.network_class, folder, tree, self.blocks_of)
        return replace(source, repeated=self.repeated_of(source.network))
