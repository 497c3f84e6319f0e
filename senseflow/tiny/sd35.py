"""The embedded SD3.5 teachers: flow matching with captions dropped, guided by CFG.

Medium has dual attention in its first blocks, Large has none and one block more.
"""

from typing import Any

import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor

from senseflow.tiny.lesson import Learner, flow_at, without_dropped
from senseflow.tiny.text import CLIP_WIDTHS, SD35_T5_WIDTH, SD35Text

SAMPLING_SHIFT = 3.0
SIZES: dict[str, dict[str, Any]] = {
    "sd35_medium": {"num_layers": 4, "dual_attention_layers": (0, 1)},
    "sd35_large": {"num_layers": 5, "dual_attention_layers": ()},
}


class SD35Learner(Learner):
    """An untrained SD3.5 transformer with its three text encoders."""

    def __init__(self, size: str) -> None:
        super().__init__()
        self.text = SD35Text()
        self.network = SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=8,
            out_channels=8,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=SD35_T5_WIDTH,
            caption_projection_dim=64,
            pooled_projection_dim=sum(CLIP_WIDTHS),
            pos_embed_max_size=12,
            qk_norm="rms_norm",
            **SIZES[size],
        )
        self.empty = self.text.tokenize([""])

    def loss(
        self, x_0: Tensor, eps: Tensor, u: Tensor, ids: list[Tensor], dropped: Tensor
    ) -> Tensor:
        """Flow matching, (eps - x_0) against the velocity."""
        sigma, x_t = flow_at(x_0, eps, u)
        prompt_embeds, pooled = self.text(without_dropped(ids, self.empty, dropped))
        velocity = self.network(
            hidden_states=x_t,
            timestep=1000 * sigma,
            encoder_hidden_states=prompt_embeds,
            pooled_projections=pooled,
            return_dict=False,
        )[0]
        return F.mse_loss(velocity, eps - x_0)

    def pipeline(self, vae: AutoencoderKL) -> StableDiffusion3Pipeline:
        """With SD3.5's shift."""
        scheduler = FlowMatchEulerDiscreteScheduler(shift=SAMPLING_SHIFT)
        return StableDiffusion3Pipeline(
            scheduler=scheduler, vae=vae, transformer=self.network, **self.text.components()
        )
