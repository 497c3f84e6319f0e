"""FLUX.1: the adapter and the networks of a diffusers FluxPipeline folder.

Its guidance is an embedding: the teacher has one, student and fake score do not. Latents are
packed: 2 x 2 patches become tokens of 4 C channels.
"""

from dataclasses import replace
from typing import Any

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn

from senseflow.common.files import read_json
from senseflow.teachers.adapter import Adapter, Networks, device_of
from senseflow.teachers.encoded import Conditioning
from senseflow.teachers.folder import TeacherSettings
from senseflow.teachers.text_encoders import CLIP, T5
from senseflow.weights.meta import NetworkSource, open_network
from senseflow.weights.stored import Stored, Weights

GUIDANCE_EMBEDDER = "time_text_embed.guidance_embedder."
TIME_BIAS = "time_text_embed.timestep_embedder.linear_2.bias"


class FluxAdapter(Adapter):
    """A FLUX teacher without its transformer: prompts, images, packing, time and guidance."""

    pipeline_class = FluxPipeline
    component = "transformer"
    text_encoders = (CLIP, T5)

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """T5's states and CLIP's pooled vector."""
        # The two parts of its encode_prompt, which makes zeros on the host too, as ids of the text.
        device, length = device_of(self.pipeline), self.settings.max_sequence_length
        return Conditioning(
            self.pipeline._get_t5_prompt_embeds(prompts, device=device, max_sequence_length=length),
            self.pipeline._get_clip_prompt_embeds(prompts, device=device),
        )

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """Without guidance, or at the constant that a LoRA student's embedding is fed."""
        fed = self.settings.guidance if self.settings.lora else None
        guidance = None if fed is None else torch.full_like(t, fed)
        return self._call(network, x_t, t, cond, guidance)

    def predict_guided(
        self, teacher: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning, scale: Tensor
    ) -> Tensor:
        """The guidance goes into the teacher's embedding: one forward."""
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
        assert cond.pooled is not None
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


# ------------------------------------------------------------------------------------- networks


def blocks_of(network: FluxTransformer2DModel) -> list[nn.Module]:
    """The units of sharding, of activation checkpointing and of compilation."""
    return [*network.transformer_blocks, *network.single_transformer_blocks]


class FluxNetworks(Networks):
    """The teacher with its guidance embedding, the student without."""

    def teacher(self, settings: TeacherSettings) -> NetworkSource:
        """The frozen teacher of a FLUX folder; it must have a guidance embedding."""
        folder = settings.folder / "transformer"
        if not read_json(folder / "config.json").get("guidance_embeds"):
            raise ValueError(
                f"{folder} has no guidance embedding; the FLUX recipe guides its teacher through "
                "one"
            )
        return super().teacher(settings)

    def student(self, settings: TeacherSettings) -> NetworkSource:
        """The start of student and fake score: the teacher's weights without guidance embedding.

        settings.student_config: the student's config.json; None takes the teacher's and drops the
        embedding. settings.linked: a folder whose transformer/ holds links to the teacher's weights
        and, for when there is no student_config, a config.json. settings.fold_guidance: adds what
        the embedding says at this guidance to the bias of the time embedding's last layer, so that
        the student starts as the teacher at that guidance, exactly.
        """
        folder = (settings.linked or settings.folder) / "transformer"
        tree = read_json(settings.student_config or folder / "config.json")
        source, weights = open_network(
            self.network_class,
            folder,
            _student_config(settings, tree),
            blocks_of,
            spare=GUIDANCE_EMBEDDER,
        )
        source = replace(source, repeated=source.blocks)
        if settings.fold_guidance is None:
            return source
        offset = guidance_offset(weights, settings.fold_guidance)

        def read(key: str) -> Stored:
            stored = weights.read(key)
            return stored[...].float() + offset if key == TIME_BIAS else stored

        return replace(source, read=read)


def _student_config(settings: TeacherSettings, config: dict[str, Any]) -> dict[str, Any]:
    if settings.student_config is None and settings.linked is None:
        # The student has learnt its guidance: an input for it would have nothing to say.
        return {**config, "guidance_embeds": False}
    if config.get("guidance_embeds"):
        raise ValueError("the student's config.json must say guidance_embeds: false")
    return config


def guidance_offset(weights: Weights, guidance: float) -> Tensor:
    """The guidance embedding (width,) at one guidance, float32: a constant the time embedding's
    last bias can carry, because the two embeddings are added."""
    keys = ["linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias"]
    if any(GUIDANCE_EMBEDDER + key not in weights.keys for key in keys):
        raise ValueError(
            f"{weights.source} has no guidance embedder to fold: student.fold_guidance"
        )
    state = {key: weights.read(GUIDANCE_EMBEDDER + key)[...].float() for key in keys}
    width, frequencies = state["linear_1.weight"].shape
    embedder = TimestepEmbedding(in_channels=frequencies, time_embed_dim=width)
    embedder.load_state_dict(state)
    project = Timesteps(frequencies, flip_sin_to_cos=True, downscale_freq_shift=0)
    with torch.no_grad():
        # The module multiplies guidance by 1000, as it does time.
        offset: Tensor = embedder(project(torch.tensor([1000 * guidance])))[0]
    return offset


NETWORKS = FluxNetworks(FluxAdapter, FluxTransformer2DModel, blocks_of, blocks_of)
