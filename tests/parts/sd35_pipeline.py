"""Random StableDiffusion3Pipelines of a few thousand parameters, Medium-like and Large-like."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from text_parts import PROJECTIONS, SD35_T5_WIDTH, t5_text, t5_tokenizer, tiny_vae, two_clips

UNIT = 4  # pixels of one image token: the VAE's factor 2, patches of 2 x 2
MAX_SIDE = 48  # pixels: 12 positions each way


def transformer(large: bool = False) -> SD3Transformer2DModel:
    """Four heads of 8. Medium: two blocks, dual attention in the first; Large: three, no dual."""
    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3 if large else 2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=SD35_T5_WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=sum(PROJECTIONS),
        pos_embed_max_size=MAX_SIDE // UNIT,
        dual_attention_layers=() if large else (0,),
        qk_norm="rms_norm",
    ).eval()


def vae() -> AutoencoderKL:
    """SD3.5's scaling and shift, no quant convolutions."""
    return tiny_vae(scaling=1.5305, shift=0.0609)


def save_sd35_pipeline(folder: Path, large: bool = False, seed: int = 0) -> Path:
    """Build the pipeline with the weights of `seed` and save it as diffusers does."""
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    t5 = t5_tokenizer()
    StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(),
        **two_clips(first_has_projection=True),
        text_encoder_3=t5_text(t5, SD35_T5_WIDTH),
        tokenizer_3=t5,
        transformer=transformer(large),
    ).save_pretrained(folder)
    torch.set_rng_state(state)
    return folder
