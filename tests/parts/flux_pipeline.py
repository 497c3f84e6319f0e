"""A random FluxPipeline of a few thousand parameters: every real class, no real weights."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from text_parts import clip_config, clip_tokenizer, t5_text, t5_tokenizer, tiny_vae
from transformers import CLIPTextModel

UNIT = 4  # pixels of one image token: the VAE's factor 2, packed 2 x 2


def transformer(guidance_embeds: bool = True) -> FluxTransformer2DModel:
    """1 + 1 blocks, two heads of 16; the output layer is not zero, so that inputs matter."""
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    ).eval()


def vae() -> AutoencoderKL:
    """FLUX's scaling and shift, no quant convolutions."""
    return tiny_vae(scaling=0.3611, shift=0.1159)


def save_flux_pipeline(folder: Path, seed: int = 0) -> Path:
    """Build the pipeline with the weights of `seed` and save it as diffusers does."""
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.1582, use_dynamic_shifting=False),
        vae=vae(),
        text_encoder=CLIPTextModel(clip_config(clip)).eval(),
        tokenizer=clip,
        text_encoder_2=t5_text(t5),
        tokenizer_2=t5,
        transformer=transformer(),
    ).save_pretrained(folder)
    torch.set_rng_state(state)
    return folder
