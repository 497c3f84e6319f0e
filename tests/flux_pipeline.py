"""A random FluxPipeline of a few thousand parameters: every real class, no real weights."""

import string
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel
from transformers import T5Tokenizer as T5

LETTERS = string.ascii_lowercase + string.digits
T5_LENGTH = 16  # tokens the T5 tokenizer admits
UNIT = 4  # pixels of one image token: the VAE's factor 2, packed 2 x 2


def clip_tokenizer() -> CLIPTokenizer:
    """One token per letter."""
    pieces = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{c}</w>" for c in LETTERS)]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def t5_tokenizer() -> T5:
    """One token per letter or space."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", *LETTERS]
    return T5(vocab=[(p, -1.0) for p in pieces], extra_ids=0, model_max_length=T5_LENGTH)


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
    """Factor 2, four latent channels, no quant convolutions."""
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()


def clip_text(vocab_size: int) -> CLIPTextModel:
    """32 wide; its pooled output is taken at the end-of-text token, id 1."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocab_size,
            hidden_size=32,
            intermediate_size=64,
            projection_dim=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    ).eval()


def t5_text(vocab_size: int) -> T5EncoderModel:
    """32 wide."""
    return T5EncoderModel(
        T5Config(
            vocab_size=vocab_size,
            d_model=32,
            d_kv=16,
            d_ff=64,
            num_layers=1,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        )
    ).eval()


def save_flux_pipeline(folder: Path, seed: int = 0) -> Path:
    """Build the pipeline with the weights of `seed` and save it as diffusers does."""
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.1582, use_dynamic_shifting=False),
        vae=vae(),
        text_encoder=clip_text(len(clip)),
        tokenizer=clip,
        text_encoder_2=t5_text(len(t5)),
        tokenizer_2=t5,
        transformer=transformer(),
    ).save_pretrained(folder)
    torch.set_rng_state(state)
    return folder
