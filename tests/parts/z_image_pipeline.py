"""A random ZImagePipeline of a few thousand parameters: every real class, no real weights."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from text_parts import qwen3_text, qwen_tokenizer, tiny_vae

UNIT = 4  # pixels of one image token: the VAE's factor 2, patches of 2 x 2
MAX_SIDE = 48  # pixels: 12 positions each way
SHIFT = 6.0


def transformer() -> ZImageTransformer2DModel:
    """Two layers and a refiner each of image and prompt, two heads of 24.

    Padding tokens and norms are not as they are made, so that all of it matters.
    """
    network = ZImageTransformer2DModel(
        in_channels=4,
        dim=48,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 8, 8],
        axes_lens=[96, MAX_SIDE // UNIT, MAX_SIDE // UNIT],
    )
    for name, parameter in network.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        if "pad_token" in name:
            torch.nn.init.normal_(parameter)
    return network.eval()


def vae() -> AutoencoderKL:
    """FLUX.1's scaling and shift, no quant convolutions."""
    return tiny_vae(scaling=0.3611, shift=0.1159)


def save_z_image_pipeline(folder: Path, seed: int = 0) -> Path:
    """Build the pipeline with the weights of `seed` and save it as diffusers does."""
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    tokenizer = qwen_tokenizer()
    ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT, use_dynamic_shifting=False),
        vae=vae(),
        text_encoder=qwen3_text(tokenizer, num_layers=3, head=False),
        tokenizer=tokenizer,
        transformer=transformer(),
    ).save_pretrained(folder)
    torch.set_rng_state(state)
    return folder
