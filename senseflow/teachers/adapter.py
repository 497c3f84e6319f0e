"""A teacher as the iteration sees it: frozen encoders, and how a network is called.

An adapter holds the frozen encoders, never a trained network: generator, fake score and teacher
share one signature and are arguments. Packing, position and time ids, the network's own time, the
sign of its output and the way it is guided stay inside.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ModelMixin
from diffusers.models.autoencoders.vae import Decoder
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2D, UpDecoderBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from senseflow.common.files import read_json
from senseflow.core.guidance import guide
from senseflow.core.path import Path as NoisePath
from senseflow.teachers.encoded import Conditioning, KnownPrompts, Posterior, is_mask
from senseflow.teachers.folder import (
    INDEX,
    TeacherSettings,
    encoder_classes,
    left_out,
    require_vocabularies,
)
from senseflow.teachers.text_encoders import (
    Kinds,
    keep_recording,
    put_tokens_on,
    text_encoders,
)
from senseflow.weights.filling import channels_last, whole
from senseflow.weights.meta import (
    Blocks,
    Build,
    NetworkSource,
    component,
    frozen_network,
    open_network,
)

Norms = Mapping[type[nn.Module], tuple[tuple[str, str], ...]]
IP_ADAPTER = ("image_encoder", "feature_extractor")  # which a prompt alone does not use


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
    # Of the VAE's decoder: what is recomputed on the way back, each by itself; what holds several
    # of these; and names of norms with those of the activations that follow them.
    decoder_blocks: ClassVar[tuple[type[nn.Module], ...]] = (ResnetBlock2D, Upsample2D)
    decoder_stages: ClassVar[tuple[type[nn.Module], ...]] = (UNetMidBlock2D, UpDecoderBlock2D)
    decoder_norms: ClassVar[Norms] = {
        ResnetBlock2D: (("norm1", "nonlinearity"), ("norm2", "nonlinearity")),
        Decoder: (("conv_norm_out", "conv_act"),),
    }

    pipeline: Any  # a diffusers pipeline without its denoiser
    path: NoisePath  # with the clock that all times of the iteration are read on
    shape: tuple[int, int, int]  # (C, h, w) of one sample
    settings: TeacherSettings
    empty: Conditioning | None = None  # the encoding of its null prompt, B = 1; None: it has none

    @classmethod
    def load(
        cls,
        settings: TeacherSettings,
        path: NoisePath,
        shape: tuple[int, int, int],
        device: torch.device,
        build: Build,
        known: KnownPrompts | None,
        null_prompt: str | None,
    ) -> Self:
        """Read the frozen encoders, VAE and scheduler of a pipeline folder, not its denoiser.

        `build` loads the text encoders, one after the other. With `known` there are none, and
        `encode_prompts` is not to be called. null_prompt: is encoded once, or taken from `known`.
        """
        folder, dtype = settings.folder, settings.compute_dtype
        encoders = text_encoders(folder, cls.text_encoders, dtype) if known is None else {}
        vae = component(folder / "vae", settings.vae_dtype, cls.vae_class)
        networks = {name: keep_recording(build(source)) for name, source in encoders.items()}
        # Without the denoiser: its weights are read by rows, into shards.
        pipeline = cls.pipeline_around(
            folder, {**networks, "vae": channels_last(whole(vae, device))}
        )
        put_tokens_on(device, pipeline)
        path.put_on(device)
        adapter = cls(pipeline, path, shape, settings)
        if null_prompt is None:
            return adapter
        found = known.conditioning(null_prompt) if known else adapter.encode_prompts([null_prompt])
        return replace(adapter, empty=found.map(lambda x: x if is_mask(x) else x.to(device)))

    @classmethod
    def read_pipeline(
        cls,
        folder: Path,
        network: Callable[[], nn.Module] | None,
        dtype: torch.dtype,
        vae_dtype: torch.dtype,
        **settings: Any,
    ) -> Any:
        """All of a pipeline folder in host memory, to draw with.

        network: reads the denoiser; None: it is the folder's own. settings: of the pipeline. Raises
        ValueError, naming what is missing or does not fit, before any weight is read.
        """
        sources = text_encoders(folder, cls.text_encoders, dtype)
        sources["vae"] = component(folder / "vae", vae_dtype)
        if network is None:
            sources[cls.component] = component(folder / cls.component, dtype)
        networks = {cls.component: network()} if network else {}
        networks |= {name: whole(source) for name, source in sources.items()}
        return cls.pipeline_around(folder, networks, **settings)

    @classmethod
    def pipeline_around(cls, folder: Path, networks: dict[str, nn.Module], **settings: Any) -> Any:
        """The pipeline of these networks, without those that are not among them; the folder's
        tokenizers and its scheduler are read. Raises ValueError."""
        require_vocabularies(folder)
        unused = [name for name in IP_ADAPTER if name in read_json(folder / INDEX)]
        absent = [cls.component, *encoder_classes(folder), *left_out(folder), *unused]
        parts = {**dict.fromkeys(absent), **networks, **settings}
        try:
            # diffusers reads no weights here: it leaves those that it does not find random.
            pipeline: Any = cls.pipeline_class.from_pretrained(
                folder, **parts, local_files_only=True
            )
        except (OSError, RuntimeError, ValueError, TypeError) as error:
            for file in sorted(folder.glob("*/*.json")):
                read_json(file)  # which names one that holds no JSON object
            said = " ".join(str(error).split())
            raise ValueError(f"{folder} is damaged or lacks a file: {said}") from error
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    @property
    def compute_dtype(self) -> torch.dtype:
        """The type in which networks are called."""
        return self.settings.compute_dtype

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
        return Posterior.of(found.mean, found.std)

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

        scale (B,): the pipeline's own number, such as its `guidance_scale`; so are dmd.guidance and
        isg.guidance in a configuration, and --guidance of a script.
        """


class CfgAdapter(Adapter):
    """A teacher guided by classifier-free guidance."""

    def null(self, cond: Conditioning) -> Conditioning:
        """The conditioning of no prompt, for as many samples as `cond`: the null prompt's."""
        assert self.empty is not None
        return self.empty.expand(len(cond))

    def guide(self, uncond: Tensor, cond: Tensor, scale: Tensor) -> Tensor:
        """The pipeline's own guidance: uncond + scale (cond - uncond).

        A family whose pipeline counts from 0 (cond + w (cond - uncond)), or rescales what comes
        out, says so here, and where it is off in the family's `unguided`.
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
