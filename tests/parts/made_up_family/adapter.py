"""The made-up family's adapter and networks."""

import torch
from diffusers import SD3Transformer2DModel
from senseflow.teachers.made_up.pipeline import POOLED, MadeUpPipeline
from torch import Tensor, nn

from senseflow.core.guidance import guide
from senseflow.teachers.adapter import CfgAdapter, Networks
from senseflow.teachers.encoded import Conditioning
from senseflow.teachers.text_encoders import T5


class MadeUpAdapter(CfgAdapter):
    """A made-up teacher without its transformer."""

    pipeline_class = MadeUpPipeline
    component = "transformer"
    text_encoders = (T5,)

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """One T5, and which of its states are padding."""
        embeds, mask = self.pipeline.encode(prompts, self.settings.max_sequence_length)
        return Conditioning(embeds, mask=mask)

    def guide(self, uncond: Tensor, cond: Tensor, scale: Tensor) -> Tensor:
        """cond + w (cond - uncond)."""
        return guide(uncond, cond, scale + 1)

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """v at (x_t, t); padding is zeros."""
        assert cond.mask is not None and cond.pooled is None
        embeds = (cond.prompt_embeds * cond.mask[..., None]).to(self.compute_dtype)
        output = network(
            hidden_states=x_t.to(self.compute_dtype),
            timestep=t,
            encoder_hidden_states=embeds,
            pooled_projections=embeds.new_zeros(len(cond), POOLED),
            return_dict=False,
        )[0]
        return output.float()


def blocks_of(network: SD3Transformer2DModel) -> list[nn.Module]:
    return list(network.transformer_blocks)


NETWORKS = Networks(MadeUpAdapter, SD3Transformer2DModel, blocks_of, blocks_of)
