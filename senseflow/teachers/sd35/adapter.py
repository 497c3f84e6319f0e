"""Stable Diffusion 3.5: the adapter and the networks of a StableDiffusion3Pipeline folder.

SD3.5 is a flow teacher with classifier-free guidance; no prompt is the encoding of "". Its clock is
the index before the scheduler's shift (3): laws of t and ISG's mid-points are drawn there, and the
network is told 1000 sigma. Medium and Large are one architecture with other configurations.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn

from senseflow.common.files import read_json
from senseflow.teachers.adapter import CfgAdapter, Networks, device_of
from senseflow.teachers.encoded import Conditioning
from senseflow.teachers.text_encoders import PROJECTED_CLIP, T5


class SD35Adapter(CfgAdapter):
    """An SD3.5 teacher without its transformer."""

    pipeline_class = StableDiffusion3Pipeline
    component = "transformer"
    text_encoders = (PROJECTED_CLIP, T5)

    @classmethod
    def pipeline_around(cls, folder: Path, networks: dict[str, nn.Module], **settings: Any) -> Any:
        """The pipeline of these networks; without T5 it looks at a transformer for the width of the
        zeros in its place, and finds the config of one."""
        pipeline = super().pipeline_around(folder, networks, **settings)
        if cls.component not in networks and pipeline.text_encoder_3 is None:
            config = read_json(folder / cls.component / "config.json")
            pipeline.transformer = SimpleNamespace(config=SimpleNamespace(**config))
        return pipeline

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """Both CLIPs and T5 on the sequence axis, and both projections as pooled."""
        # Without its null prompt, which is encoded once and not with every batch.
        prompt_embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompts,
            None,
            None,
            device=device_of(self.pipeline),
            do_classifier_free_guidance=False,
            max_sequence_length=self.settings.max_sequence_length,
        )
        return Conditioning(prompt_embeds, pooled)

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """v at (x_t, t), float32; the network is told 1000 sigma."""
        assert cond.pooled is not None
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


def blocks_of(network: SD3Transformer2DModel) -> list[nn.Module]:
    """The units of sharding, of activation checkpointing and of compilation."""
    return list(network.transformer_blocks)


NETWORKS = Networks(SD35Adapter, SD3Transformer2DModel, blocks_of, blocks_of)
