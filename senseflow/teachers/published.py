"""The public teacher of a family: its licence, and its folder's JSON files at full size.

Facts of the files that the teachers are released with; what a class of diffusers or transformers
has by default is left out. A plan without the teacher's folder is made of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

HUB = "https://huggingface.co"

SDXL_VAE = dict(
    _class_name="AutoencoderKL",
    block_out_channels=[128, 256, 512, 512],
    down_block_types=["DownEncoderBlock2D"] * 4,
    up_block_types=["UpDecoderBlock2D"] * 4,
    layers_per_block=2,
    latent_channels=4,
    norm_num_groups=32,
    sample_size=1024,
    scaling_factor=0.13025,
    force_upcast=True,
)
FLUX_VAE = SDXL_VAE | dict(
    latent_channels=16,
    scaling_factor=0.3611,
    shift_factor=0.1159,
    use_quant_conv=False,
    use_post_quant_conv=False,
)


@dataclass(frozen=True)
class Encoder:
    """A text encoder and the length of its tokenizer; classes of transformers."""

    name: str
    config: dict[str, Any]
    tokenizer: str = "CLIPTokenizer"
    length: int = 77


CLIP_L = dict(
    model_type="clip_text_model",
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    hidden_act="quick_gelu",
    projection_dim=768,
)
BIG_G = CLIP_L | dict(
    hidden_size=1280,
    intermediate_size=5120,
    num_hidden_layers=32,
    num_attention_heads=20,
    hidden_act="gelu",
    projection_dim=1280,
)
T5_XXL = Encoder(
    "T5EncoderModel",
    dict(
        model_type="t5",
        d_model=4096,
        d_kv=64,
        d_ff=10240,
        num_layers=24,
        num_heads=64,
        feed_forward_proj="gated-gelu",
    ),
    "T5Tokenizer",
    length=512,
)

QWEN3_4B = dict(
    model_type="qwen3",
    hidden_size=2560,
    intermediate_size=9728,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=40960,
    rope_theta=1000000,
    tie_word_embeddings=True,
    vocab_size=151936,
)


@dataclass(frozen=True)
class Terms:
    """A teacher's name and licence, in the Hub's words; None: not known here, nor said."""

    base_model: str | None
    license: str | None  # an identifier of the Hub, or other
    license_name: str | None = None  # of another
    license_link: str | None = None

    @classmethod
    def of_hub(cls, model: str, name: str) -> "Terms":
        """A licence of the teacher's own that is kept beside it."""
        return cls(model, "other", name, f"{HUB}/{model}/blob/main/LICENSE.md")


@dataclass(frozen=True)
class Published:
    """A teacher that anyone can have."""

    terms: Terms
    num_parameters: int  # of its denoiser, by which it is told from networks of the same kind
    denoiser: dict[str, Any]  # config.json, with its _class_name; so are these:
    scheduler: dict[str, Any]
    vae: dict[str, Any]
    encoders: tuple[Encoder, ...]
    settings: dict[str, Any] = field(default_factory=dict)  # of the pipeline

    def numbered(self) -> Iterator[tuple[str, Encoder]]:
        """The encoders with what diffusers puts behind their names: nothing, _2, _3."""
        return zip(("", "_2", "_3"), self.encoders, strict=False)

    def files(self, pipeline_class: str, component: str) -> dict[str, dict[str, Any]]:
        """The JSON files by path in the pipeline folder; tokenizers have their length alone."""
        parts = {"vae": self.vae, "scheduler": self.scheduler, component: self.denoiser}
        index: dict[str, Any] = {
            "_class_name": pipeline_class,
            **{name: ["diffusers", config["_class_name"]] for name, config in parts.items()},
            **self.settings,
        }
        trees = {
            "model_index.json": index,
            "scheduler/scheduler_config.json": parts.pop("scheduler"),
            **{f"{name}/config.json": config for name, config in parts.items()},
        }
        for suffix, encoder in self.numbered():
            length = {"model_max_length": encoder.length}
            index[f"text_encoder{suffix}"] = ["transformers", encoder.name]
            index[f"tokenizer{suffix}"] = ["transformers", encoder.tokenizer]
            trees[f"text_encoder{suffix}/config.json"] = encoder.config
            trees[f"tokenizer{suffix}/tokenizer_config.json"] = length
        return trees
