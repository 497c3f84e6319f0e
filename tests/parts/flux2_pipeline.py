"""A random Flux2KleinPipeline of some thousand parameters: every real class, no real weights."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from text_parts import QWEN_WIDTH, qwen3_text, qwen_tokenizer

UNIT = 4  # pixels of one image token: the VAE's factor 2, patched 2 x 2
TEXT_LAYERS = 28  # the last state that is read is the 27th, before the last norm


def transformer() -> Flux2Transformer2DModel:
    """1 + 1 blocks, two heads of 16."""
    return Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * QWEN_WIDTH,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    ).eval()


def vae() -> AutoencoderKLFlux2:
    """Factor 2, four latent channels; every channel of a patch has its own statistics."""
    made = AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    ).eval()
    made.bn.running_mean.uniform_(-1, 1)
    made.bn.running_var.uniform_(0.001, 0.01)  # so small that the eps added to it counts
    return made


def save_flux2_pipeline(folder: Path, seed: int = 0) -> Path:
    """Build the pipeline with the weights of `seed` and save it as diffusers does."""
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    tokenizer = qwen_tokenizer()
    Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae(),
        text_encoder=qwen3_text(tokenizer, TEXT_LAYERS),
        tokenizer=tokenizer,
        transformer=transformer(),
    ).save_pretrained(folder)
    torch.set_rng_state(state)
    return folder
