"""Tiny tokenizers, text encoders and a VAE that the random pipelines of the tests share."""

import string

import torch
from diffusers import AutoencoderKL
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)
from transformers import T5Tokenizer as T5

LETTERS = string.ascii_lowercase + string.digits
ENDS = ["<|startoftext|>", "<|endoftext|>"]
T5_LENGTH = 16  # tokens the T5 tokenizer admits
CLIP_WIDTHS = (16, 24)  # of SD3.5's and SDXL's two towers
PROJECTIONS = (12, 20)
SD35_T5_WIDTH = 64
QWEN_LENGTH = 40  # tokens the Qwen tokenizer admits
QWEN_WIDTH = 16
QWEN_TURN = 25  # of them for a turn without a word in it, and the beginning of an answer
QWEN_TEMPLATE = """
{%- for message in messages %}
    {%- if message.role == "user" or message.role == "system" %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>assistant\\n<think>\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""


def clip_tokenizer() -> CLIPTokenizer:
    """One token per letter, padded with the end token."""
    pieces = [*ENDS, *LETTERS, *(f"{c}</w>" for c in LETTERS)]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def second_clip_tokenizer() -> CLIPTokenizer:
    """The same, padded with "!" (id 0), as the second tokenizer of SDXL and SD3.5."""
    pieces = ["!", *LETTERS, *(f"{c}</w>" for c in LETTERS), *ENDS]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77, pad_token="!")


def t5_tokenizer() -> T5:
    """One token per letter or space."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", *LETTERS]
    return T5(vocab=[(p, -1.0) for p in pieces], extra_ids=0, model_max_length=T5_LENGTH)


def clip_config(
    tokenizer: CLIPTokenizer, width: int = 32, projection: int = 32, num_layers: int = 1
) -> CLIPTextConfig:
    """Two heads; the pooled output is taken at the tokenizer's end token."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=projection,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def t5_text(tokenizer: T5, width: int = 32) -> T5EncoderModel:
    """One layer."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=width,
            d_kv=16,
            d_ff=64,
            num_layers=1,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        )
    ).eval()


def qwen_tokenizer() -> Qwen2Tokenizer:
    """One token per letter, space or new line; marks and a chat template as Qwen3's."""
    specials, marks = ["<|im_start|>", "<|im_end|>"], ["<think>", "</think>"]
    pieces = [*LETTERS, "Ġ", "Ċ", "<|endoftext|>"]
    tokenizer = Qwen2Tokenizer(
        vocab={piece: number for number, piece in enumerate(pieces)},
        additional_special_tokens=specials,
        model_max_length=QWEN_LENGTH,
        chat_template=QWEN_TEMPLATE,
    )
    tokenizer.add_tokens(marks)
    return tokenizer


def qwen3_text(
    tokenizer: Qwen2Tokenizer, num_layers: int, head: bool = True, tied: bool = True
) -> Qwen3ForCausalLM | Qwen3Model:
    """Two heads of 8, one of keys; its norms are not all ones."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=QWEN_WIDTH,
        intermediate_size=24,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        initializer_range=0.2,
    )
    network = (Qwen3ForCausalLM if head else Qwen3Model)(config).eval()
    for name, parameter in network.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return network


def two_clips(first_has_projection: bool) -> dict[str, object]:
    """Both towers of SD3.5 (each with a projection) or SDXL (the second alone), by name.

    Three layers, because the penultimate states are used; every width is another number.
    """
    tokenizers = (clip_tokenizer(), second_clip_tokenizer())
    classes = (
        CLIPTextModelWithProjection if first_has_projection else CLIPTextModel,
        CLIPTextModelWithProjection,
    )
    parts: dict[str, object] = {}
    for name, number in (("", 0), ("_2", 1)):
        config = clip_config(tokenizers[number], CLIP_WIDTHS[number], PROJECTIONS[number], 3)
        parts[f"tokenizer{name}"] = tokenizers[number]
        parts[f"text_encoder{name}"] = classes[number](config).eval()
    return parts


def tiny_vae(scaling: float, shift: float | None, quant_convs: bool = False) -> AutoencoderKL:
    """Factor 2, four latent channels."""
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=scaling,
        shift_factor=shift,
        use_quant_conv=quant_convs,
        use_post_quant_conv=quant_convs,
    ).eval()
