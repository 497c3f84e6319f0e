"""The embedded FLUX.2-klein teacher: flow matching with captions dropped, guided by CFG.

Its autoencoder is that of all families with the statistics of its patches beside it; its Qwen3 is
asked by the teacher's own code, through a shorter chat template.
"""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from torch import Tensor
from transformers import Qwen3ForCausalLM

from senseflow.teachers.flux2.adapter import normalised, position_ids
from senseflow.teachers.flux2.prompts import CHAT
from senseflow.tiny.captions import split_scenes
from senseflow.tiny.lesson import Learner, flow_at, without_dropped
from senseflow.tiny.pictures import draw_scenes, render
from senseflow.tiny.text import (
    QWEN_LENGTH,
    QWEN_WIDTH,
    ChatText,
    new_qwen3,
    new_qwen_tokenizer,
)
from senseflow.tiny.vae import new_vae

LATENT_SHAPE = (32, 4, 4)  # of one sample: 2 x 2 patches of 8 x 8 x 8
NUM_MEASURED = 1000  # pictures, for the statistics


class Flux2Learner(Learner):
    """An untrained FLUX.2 transformer with its text encoder."""

    def __init__(self) -> None:
        super().__init__()
        tokenizer = new_qwen_tokenizer()
        # as deep as the last state that is read
        encoder = new_qwen3(Qwen3ForCausalLM, tokenizer, num_layers=CHAT.layers[-1])
        self.text = ChatText(CHAT, tokenizer, encoder)
        self.network = Flux2Transformer2DModel(
            patch_size=1,
            in_channels=LATENT_SHAPE[0],
            num_layers=2,
            num_single_layers=4,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=3 * QWEN_WIDTH,
            timestep_guidance_channels=64,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        )
        self.empty = self.text.tokenize([""])

    @torch.no_grad()
    def encode(self, vae: Any, images: Tensor) -> Tensor:
        """Latents (B, 32, 4, 4) of images (B, 3, 32, 32), by the statistics of patches."""
        return normalised(vae, vae.encode(images).latent_dist.mode())

    def loss(
        self, x_0: Tensor, eps: Tensor, u: Tensor, ids: list[Tensor], dropped: Tensor
    ) -> Tensor:
        """Flow matching, (eps - x_0) against the velocity; latents are (B, 32, 4, 4)."""
        sigma, x_t = flow_at(x_0, eps, u)
        _, _, rows, columns = x_t.shape
        velocity = self.network(
            hidden_states=x_t.flatten(2).transpose(1, 2),
            timestep=sigma,
            encoder_hidden_states=self.text(without_dropped(ids, self.empty, dropped)),
            img_ids=position_ids(rows, columns, 1, x_t.device),
            txt_ids=position_ids(1, 1, QWEN_LENGTH, x_t.device),
            return_dict=False,
        )[0]
        return F.mse_loss(velocity.transpose(1, 2).reshape(x_t.shape), eps - x_0)

    def pipeline(self, vae: Any) -> Flux2KleinPipeline:
        """With its own schedule, which the pipeline makes."""
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
        return Flux2KleinPipeline(
            scheduler=scheduler, vae=vae, transformer=self.network, **self.text.components()
        )


@torch.no_grad()
def with_statistics(vae: AutoencoderKL, seed: int) -> Any:
    """An autoencoder in FLUX.2's class, and the mean and variance of its latents' patches."""
    config = vae.config
    shared = (
        *("down_block_types", "up_block_types", "block_out_channels", "layers_per_block"),
        *("latent_channels", "norm_num_groups", "sample_size", "use_quant_conv"),
        *("use_post_quant_conv", "mid_block_add_attention"),
    )
    made: Any = AutoencoderKLFlux2(**{name: config[name] for name in shared}).eval()
    made.load_state_dict(vae.state_dict(), strict=False)
    generator = torch.Generator().manual_seed(seed)
    images = render(draw_scenes(split_scenes()[0], NUM_MEASURED, generator), generator)
    patches = F.pixel_unshuffle(made.encode(images).latent_dist.mode(), 2)
    made.bn.running_mean.copy_(patches.mean(dim=(0, 2, 3)))
    made.bn.running_var.copy_(patches.var(dim=(0, 2, 3)))
    return made


def new_flux2_vae() -> Any:
    """An untrained one."""
    return with_statistics(new_vae().eval(), seed=0)
