"""FLUX.1: the adapter, the networks and the anchors of a diffusers FluxPipeline folder.

FLUX is a flow teacher whose clock is sigma. Its guidance is an embedding: the teacher has one,
student and fake score do not. Latents are packed: 2 x 2 patches become tokens of 4 C channels.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn

from senseflow.core.anchors import Anchors, dynamic_mu, exponential_shift, shift_time
from senseflow.core.path import FlowPath
from senseflow.models.teacher import Conditioning
from senseflow.models.weights import Weights, component_weights

PIPELINE = "FluxPipeline"
GUIDANCE_EMBEDDER = "time_text_embed.guidance_embedder."
TIME_BIAS = "time_text_embed.timestep_embedder.linear_2.bias"


@dataclass(frozen=True)
class FluxAdapter:
    """A FLUX teacher without its transformer: prompts, images, packing, time and guidance."""

    pipeline: FluxPipeline  # transformer=None
    resolution: tuple[int, int]  # height, width in pixels
    max_sequence_length: int  # T5 tokens
    compute_dtype: torch.dtype
    path: FlowPath

    @classmethod
    def load(
        cls,
        folder: Path,
        resolution: tuple[int, int],
        max_sequence_length: int,
        compute_dtype: torch.dtype,
        vae_dtype: torch.dtype,
        device: torch.device,
    ) -> "FluxAdapter":
        """Read encoders, VAE and scheduler. Raises ValueError for a folder of another family."""
        require_flux_folder(folder)
        require_fit(folder, resolution, max_sequence_length)
        pipeline = FluxPipeline.from_pretrained(
            folder,
            transformer=None,
            dtype={"vae": vae_dtype, "default": compute_dtype},
            local_files_only=True,
        )
        pipeline.set_progress_bar_config(disable=True)
        pipeline.to(device)
        for encoder in (pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
            encoder.eval().requires_grad_(False)
        return cls(pipeline, resolution, max_sequence_length, compute_dtype, FlowPath())

    def latent_shape(self) -> tuple[int, int, int]:
        factor = self.pipeline.vae_scale_factor
        height, width = self.resolution
        return self.pipeline.vae.config.latent_channels, height // factor, width // factor

    def anchors(self, times: tuple[float, ...], shift: float | None) -> Anchors:
        """The unshifted times (thousandths) through `shift`; None: the scheduler's at this size."""
        _, height, width = self.latent_shape()
        if shift is None:
            shift = scheduler_shift(self.pipeline.scheduler.config, (height // 2) * (width // 2))
        return Anchors(tuple(shift_time(t, shift) for t in times), end=self.path.clean)

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        prompt_embeds, pooled, _ = self.pipeline.encode_prompt(
            prompts, max_sequence_length=self.max_sequence_length
        )
        return Conditioning(prompt_embeds, pooled)

    @torch.no_grad()
    def encode_images(self, images: Tensor, eps: Tensor) -> Tensor:
        vae = self.pipeline.vae
        posterior = vae.encode(images.to(vae.dtype)).latent_dist
        sample = posterior.mean.float() + posterior.std.float() * eps
        return (sample - vae.config.shift_factor) * vae.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        scaled = latents / vae.config.scaling_factor + vae.config.shift_factor
        return vae.decode(scaled.to(vae.dtype), return_dict=False)[0].float()

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return self._call(network, x_t, t, cond, None)

    def predict_guided(
        self, teacher: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning, scale: Tensor
    ) -> Tensor:
        return self._call(teacher, x_t, t, cond, scale)

    def _call(
        self,
        network: nn.Module,
        x_t: Tensor,
        t: Tensor,
        cond: Conditioning,
        guidance: Tensor | None,
    ) -> Tensor:
        """v at (x_t, t), float32; time goes through the pipeline's own dtype, step for step."""
        dtype = self.compute_dtype
        output = network(
            hidden_states=pack(x_t).to(dtype),
            encoder_hidden_states=cond.prompt_embeds.to(dtype),
            pooled_projections=cond.pooled.to(dtype),
            timestep=t.to(dtype) / 1000,  # the module multiplies by 1000 itself
            guidance=guidance,
            txt_ids=torch.zeros(cond.prompt_embeds.shape[1], 3, device=x_t.device),
            img_ids=position_ids(x_t.shape[2] // 2, x_t.shape[3] // 2, x_t.device),
            return_dict=False,
        )[0]
        return unpack(output.float(), x_t.shape[2], x_t.shape[3])


def pack(latents: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h/2 * w/2, 4 C): each 2 x 2 patch is a token."""
    b, c, h, w = latents.shape
    patches = latents.view(b, c, h // 2, 2, w // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(b, (h // 2) * (w // 2), 4 * c)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """(B, h/2 * w/2, 4 C) -> (B, C, h, w), the inverse of `pack`."""
    b, _, channels = tokens.shape
    patches = tokens.view(b, height // 2, width // 2, channels // 4, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(b, channels // 4, height, width)


def position_ids(rows: int, columns: int, device: torch.device) -> Tensor:
    """(rows * columns, 3): 0, row, column of each image token."""
    row, column = (torch.arange(n, device=device) for n in (rows, columns))
    grid = torch.cartesian_prod(row, column)
    return torch.cat([torch.zeros_like(grid[:, :1]), grid], dim=1).float()


def scheduler_shift(config: Any, num_tokens: int) -> float:
    """The constant shift of sigma that diffusers' flow scheduler applies to this many tokens."""
    if not config.use_dynamic_shifting:
        return float(config.shift)
    mu = dynamic_mu(
        num_tokens,
        config.base_image_seq_len,
        config.max_image_seq_len,
        config.base_shift,
        config.max_shift,
    )
    return exponential_shift(mu) if config.time_shift_type == "exponential" else mu


def require_fit(folder: Path, resolution: tuple[int, int], max_sequence_length: int) -> None:
    """Raise ValueError for a size the VAE cannot do, or more T5 tokens than the teacher knows."""
    levels = len(read_json(folder / "vae" / "config.json")["block_out_channels"])
    multiple = 2 * 2 ** (levels - 1)
    if any(side % multiple for side in resolution):
        raise ValueError(
            f"train.resolution {list(resolution)}: both sides must be multiples of {multiple}"
        )
    stated = read_json(folder / "tokenizer_2" / "tokenizer_config.json").get("model_max_length")
    if stated and max_sequence_length > stated:
        raise ValueError(
            f"data.max_sequence_length {max_sequence_length}: the teacher's T5 tokenizer was made "
            f"for {stated}"
        )


def require_flux_folder(folder: Path) -> None:
    """Raise ValueError unless `folder` is a diffusers FluxPipeline."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise ValueError(f"{folder} is not a diffusers pipeline folder: no model_index.json")
    name = json.loads(index.read_text()).get("_class_name")
    if name != PIPELINE:
        raise ValueError(f"{folder} holds a {name}, this recipe distils a {PIPELINE}")


# ------------------------------------------------------------------------------------- networks


@dataclass(frozen=True)
class NetworkSource:
    """A network on the meta device and where each of its weights is read."""

    network: FluxTransformer2DModel
    read: Callable[[str], Tensor]

    def blocks(self) -> list[nn.Module]:
        """The units of sharding."""
        return [*self.network.transformer_blocks, *self.network.single_transformer_blocks]


def teacher_source(folder: Path, dtype: torch.dtype) -> NetworkSource:
    """The frozen teacher of a FLUX folder; it must have a guidance embedding."""
    config = read_json(folder / "transformer" / "config.json")
    if not config.get("guidance_embeds"):
        raise ValueError(
            f"{folder}/transformer has no guidance embedding; the FLUX recipe guides its teacher "
            "through one"
        )
    weights = component_weights(folder / "transformer")
    network = meta_transformer(config).to(dtype).eval().requires_grad_(False)
    weights.require(network.state_dict())
    return NetworkSource(network, weights.read)


def student_source(
    teacher: Path, config_file: Path | None, linked: Path | None, fold_guidance: float | None
) -> NetworkSource:
    """The start of student and fake score: the teacher's weights without guidance embedding.

    config_file: the student's config.json; None takes the teacher's and drops the embedding.
    linked: a folder whose transformer/ holds links to the teacher's weights and, for when there is
    no config_file, a config.json.
    fold_guidance: adds what the embedding says at this guidance to the bias of the time embedding's
    last layer, so that the student starts as the teacher at that guidance, exactly.
    """
    folder = (linked or teacher) / "transformer"
    if config_file:
        config = read_json(config_file)
    elif linked:
        config = read_json(folder / "config.json")
    else:
        config = {**read_json(folder / "config.json"), "guidance_embeds": False}
    if config.get("guidance_embeds"):
        raise ValueError("the student's config.json must say guidance_embeds: false")
    weights = component_weights(folder)
    network = meta_transformer(config)
    weights.require(network.state_dict(), spare=GUIDANCE_EMBEDDER)
    if fold_guidance is None:
        return NetworkSource(network, weights.read)
    offset = guidance_offset(weights, fold_guidance)

    def read(key: str) -> Tensor:
        return weights.read(key).float() + offset if key == TIME_BIAS else weights.read(key)

    return NetworkSource(network, read)


def guidance_offset(weights: Weights, guidance: float) -> Tensor:
    """The guidance embedding (width,) at one guidance, float32: a constant the time embedding's
    last bias can carry, because the two embeddings are added."""
    keys = ["linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias"]
    if any(GUIDANCE_EMBEDDER + key not in weights.keys for key in keys):
        raise ValueError(
            f"{weights.source} has no guidance embedder to fold: student.fold_guidance"
        )
    state = {key: weights.read(GUIDANCE_EMBEDDER + key).float() for key in keys}
    width, frequencies = state["linear_1.weight"].shape
    embedder = TimestepEmbedding(in_channels=frequencies, time_embed_dim=width)
    embedder.load_state_dict(state)
    project = Timesteps(frequencies, flip_sin_to_cos=True, downscale_freq_shift=0)
    with torch.no_grad():
        return embedder(project(torch.tensor([1000 * guidance])))[0]


def meta_transformer(config: dict[str, Any]) -> FluxTransformer2DModel:
    """A FLUX transformer on the meta device, in float32."""
    if config.get("_class_name", "FluxTransformer2DModel") != "FluxTransformer2DModel":
        raise ValueError(f"expected a FluxTransformer2DModel, got {config['_class_name']}")
    with torch.device("meta"):
        return FluxTransformer2DModel.from_config(config)


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object; a missing or broken file is a ValueError that names it."""
    if not file.is_file():
        raise ValueError(f"{file} not found")
    try:
        return dict(json.loads(file.read_text()))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
