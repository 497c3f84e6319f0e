"""A random QwenImagePipeline of a few thousand parameters: every real class, no real weights."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from text_parts import QWEN_WIDTH, qwen_tokenizer
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

UNIT = 4  # pixels of one image token: the VAE's factor 2, patches of 2 x 2
TURN = 5  # tokens behind a prompt: the end of its turn, and how an answer begins
# of the pipeline's template: one token each, as the real tokenizer reads them
WORDS = (
    "system|\n|Describe| the| image| by| detailing| color|,| shape| size| texture| quantity| text|"
    " spatial| relationships| of| objects| and| background|:|user|assistant"
)
MEAN, STD = [0.3, -0.7, 1.1, 0.2], [2.8, 1.4, 0.6, 1.9]  # of the VAE's latents


def tokenizer() -> Qwen2Tokenizer:
    """One token per letter, but for the words of the template."""
    made = qwen_tokenizer()
    made.add_tokens(WORDS.split("|"))
    return made


def text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """Two layers of two heads of 8, one of keys, and a vision tower that nobody asks."""
    text = dict(
        vocab_size=len(tokenizer),
        hidden_size=QWEN_WIDTH,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [2, 1, 1],
        },
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=0.2,
    )
    vision = dict(
        depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=QWEN_WIDTH
    )
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return without_ones(Qwen2_5_VLForConditionalGeneration(config)).eval()


def without_ones(network: torch.nn.Module) -> torch.nn.Module:
    """Norms are not as they are made, so that all of it matters."""
    for name, parameter in network.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return network


def transformer() -> QwenImageTransformer2DModel:
    """Two layers, two heads of 24."""
    return without_ones(
        QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=24,
            num_attention_heads=2,
            joint_attention_dim=QWEN_WIDTH,
            axes_dims_rope=(8, 8, 8),
        )
    ).eval()


def vae() -> AutoencoderKLQwenImage:
    """Factor 2, four latent channels; in time too, where an image is one frame."""
    return AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=MEAN,
        latents_std=STD,
    ).eval()


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    """The published one."""
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=0.9,
        base_image_seq_len=256,
        max_image_seq_len=8192,
        shift_terminal=0.02,
    )


def save_qwen_image_pipeline(folder: Path, seed: int = 0) -> Path:
    """Build the pipeline with the weights of `seed` and save it as diffusers does."""
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    words = tokenizer()
    QwenImagePipeline(
        scheduler=scheduler(),
        vae=vae(),
        text_encoder=text_encoder(words),
        tokenizer=words,
        transformer=transformer(),
    ).save_pretrained(folder)
    torch.set_rng_state(state)
    return folder
