"""Stable Diffusion 3.5: the adapter and the networks of a StableDiffusion3Pipeline folder.

SD3.5 is a flow teacher with classifier-free guidance; no prompt is the encoding of "". Its clock is
the index before the scheduler's shift (3): laws of t and ISG's mid-points are drawn there, and the
network is told 1000 sigma. Medium and Large are one architecture with other configurations.
"""

from dataclasses import dataclass

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn

from senseflow.core.path import Path as NoisePath
from senseflow.teachers.encoded import Conditioning, KnownPrompts
from senseflow.teachers.folder import TeacherSettings
from senseflow.teachers.pipeline import (
    CfgAdapter,
    Networks,
    PlainNetwork,
    device_of,
    load_encoders,
)
from senseflow.teachers.text_encoders import PROJECTED_CLIP, T5
from senseflow.weights.meta import Build

NO_PROMPT = ""

TEXT_ENCODERS = (PROJECTED_CLIP, T5)


@dataclass(frozen=True)
class SD35Adapter(CfgAdapter):
    """An SD3.5 teacher without its transformer."""

    max_sequence_length: int  # T5 tokens
    empty: Conditioning  # the encoding of "", B = 1

    @classmethod
    def load(
        cls,
        settings: TeacherSettings,
        path: NoisePath,
        device: torch.device,
        build: Build,
        known: KnownPrompts | None,
    ) -> "SD35Adapter":
        """Read encoders and VAE; the empty prompt is encoded, or known."""
        pipeline = load_encoders(
            StableDiffusion3Pipeline, "transformer", TEXT_ENCODERS, settings, device, build, known
        )
        length = settings.max_sequence_length
        assert length, "checked by require"
        if known is None:
            empty = encode(pipeline, [NO_PROMPT], length)
        else:
            empty = known.conditioning(NO_PROMPT).map(lambda tensor: tensor.to(device))
        dtype = settings.compute_dtype
        return cls(pipeline, path, settings.resolution, dtype, length, empty)

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """Both CLIPs and T5, see `encode`."""
        return encode(self.pipeline, prompts, self.max_sequence_length)

    def null(self, cond: Conditioning) -> Conditioning:
        """The encoding of "", as the teacher was trained."""
        return self.empty.expand(len(cond.pooled))

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """v at (x_t, t), float32; the network is told 1000 sigma."""
        dtype = self.compute_dtype
        _, sigma = self.path.alpha_sigma(t)
        output: Tensor = network(
            hidden_states=x_t.to(dtype),
            timestep=1000 * sigma,  # float32, as the scheduler's
            encoder_hidden_states=cond.prompt_embeds.to(dtype),
            pooled_projections=cond.pooled.to(dtype),
            return_dict=False,
        )[0]
        return output.float()


@torch.no_grad()
def encode(
    pipeline: StableDiffusion3Pipeline, prompts: list[str], max_sequence_length: int
) -> Conditioning:
    """Both CLIPs and T5 on the sequence axis, and both projections as pooled."""
    prompt_embeds, _, pooled, _ = pipeline.encode_prompt(
        prompts,
        None,
        None,
        device=device_of(pipeline),
        do_classifier_free_guidance=False,
        max_sequence_length=max_sequence_length,
    )
    return Conditioning(prompt_embeds, pooled)


def blocks_of(network: SD3Transformer2DModel) -> list[nn.Module]:
    """The units of sharding, of activation checkpointing and of compilation."""
    return list(network.transformer_blocks)


NETWORK = PlainNetwork(SD3Transformer2DModel, "transformer", blocks_of, blocks_of)
NETWORKS = Networks(SD35Adapter.load, NETWORK.teacher, NETWORK.student, TEXT_ENCODERS)
