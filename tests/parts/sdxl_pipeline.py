"""A random StableDiffusionXLPipeline of a few ten thousand parameters: every real class."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from text_parts import CLIP_WIDTHS, PROJECTIONS, tiny_vae, two_clips

UNIT = 8  # pixels: what StableDiffusionXLPipeline asks of a side, whatever its VAE
TIME_ID_WIDTH = 8


def unet() -> UNet2DConditionModel:
    """Two levels, cross attention on the lower and in the middle; sizes and pooled text added."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(1, 2),  # numbers of heads, as in SDXL's own config
        cross_attention_dim=sum(CLIP_WIDTHS),
        norm_num_groups=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_ID_WIDTH,
        projection_class_embeddings_input_dim=6 * TIME_ID_WIDTH + PROJECTIONS[1],
    ).eval()


def vae() -> AutoencoderKL:
    """SDXL's scaling, no shift, with quant convolutions."""
    return tiny_vae(scaling=0.13025, shift=None, quant_convs=True)


def scheduler() -> EulerDiscreteScheduler:
    """SDXL's own."""
    return EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        prediction_type="epsilon",
        timestep_spacing="leading",
        steps_offset=1,
    )


def save_sdxl_pipeline(folder: Path, seed: int = 0) -> Path:
    """Build the pipeline with the weights of `seed` and save it as diffusers does."""
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    StableDiffusionXLPipeline(
        scheduler=scheduler(),
        vae=vae(),
        **two_clips(first_has_projection=False),
        unet=unet(),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    ).save_pretrained(folder)
    torch.set_rng_state(state)
    return folder
