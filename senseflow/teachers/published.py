"""The published configurations of the recipes' teachers, for a plan without their folders.

Facts of the `config.json` files that the teachers are released with; those that a class of
diffusers or transformers has by default are left out.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PretrainedConfig,
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
)

FLUX_TRANSFORMER = dict(
    _class_name="FluxTransformer2DModel",
    patch_size=1,
    in_channels=64,
    num_layers=19,
    num_single_layers=38,
    attention_head_dim=128,
    num_attention_heads=24,
    joint_attention_dim=4096,
    pooled_projection_dim=768,
    guidance_embeds=True,
    axes_dims_rope=[16, 56, 56],
)
SD35_LARGE_TRANSFORMER = dict(
    _class_name="SD3Transformer2DModel",
    sample_size=128,
    patch_size=2,
    in_channels=16,
    out_channels=16,
    num_layers=38,
    attention_head_dim=64,
    num_attention_heads=38,
    joint_attention_dim=4096,
    caption_projection_dim=2432,
    pooled_projection_dim=2048,
    pos_embed_max_size=192,
    qk_norm="rms_norm",
)
SD35_TRANSFORMER = SD35_LARGE_TRANSFORMER | dict(
    num_layers=24,
    num_attention_heads=24,
    caption_projection_dim=1536,
    pos_embed_max_size=384,
    dual_attention_layers=list(range(13)),
)
SDXL_UNET = dict(
    _class_name="UNet2DConditionModel",
    sample_size=128,
    in_channels=4,
    out_channels=4,
    block_out_channels=[320, 640, 1280],
    down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    layers_per_block=2,
    transformer_layers_per_block=[1, 2, 10],
    attention_head_dim=[5, 10, 20],
    cross_attention_dim=2048,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
    use_linear_projection=True,
)
DENOISERS: dict[str, dict[str, Any]] = {
    "flux_senseflow": FLUX_TRANSFORMER,
    "sd35_senseflow": SD35_TRANSFORMER,
    "sd35_large_senseflow": SD35_LARGE_TRANSFORMER,
    "sdxl_senseflow": SDXL_UNET,
    "sdxl_dmd2": SDXL_UNET,
}

SDXL_VAE = dict(
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

CLIP_L = CLIPTextConfig(
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    hidden_act="quick_gelu",
    projection_dim=768,
)
BIG_G = CLIPTextConfig(
    hidden_size=1280,
    intermediate_size=5120,
    num_hidden_layers=32,
    num_attention_heads=20,
    hidden_act="gelu",
    projection_dim=1280,
)
T5_XXL = T5Config(
    d_model=4096,
    d_kv=64,
    d_ff=10240,
    num_layers=24,
    num_heads=64,
    feed_forward_proj="gated-gelu",
)

T5_LENGTH = 512  # tokens that the teachers' T5 tokenizers admit
CLIP_LENGTH = 77


@dataclass(frozen=True)
class Surroundings:
    """What a pipeline folder holds besides its denoiser."""

    title: str
    pipeline: str  # class names in diffusers
    scheduler: str
    schedule: dict[str, Any]
    vae: dict[str, Any]
    encoders: tuple[tuple[type[PreTrainedModel], PretrainedConfig], ...]
    settings: dict[str, Any] = field(default_factory=dict)  # of the pipeline

    def numbered(self) -> Iterator[tuple[str, tuple[type[PreTrainedModel], PretrainedConfig]]]:
        """The encoders with what diffusers puts behind their names: nothing, _2, _3."""
        return zip(("", "_2", "_3"), self.encoders, strict=False)


SURROUNDINGS = {
    "flux": Surroundings(
        "FLUX.1-dev",
        "FluxPipeline",
        "FlowMatchEulerDiscreteScheduler",
        dict(shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15),
        FLUX_VAE,
        ((CLIPTextModel, CLIP_L), (T5EncoderModel, T5_XXL)),
    ),
    "sd35": Surroundings(
        "Stable Diffusion 3.5",
        "StableDiffusion3Pipeline",
        "FlowMatchEulerDiscreteScheduler",
        dict(shift=3.0),
        FLUX_VAE | dict(scaling_factor=1.5305, shift_factor=0.0609),
        (
            (CLIPTextModelWithProjection, CLIP_L),
            (CLIPTextModelWithProjection, BIG_G),
            (T5EncoderModel, T5_XXL),
        ),
    ),
    "sdxl": Surroundings(
        "SDXL base 1.0",
        "StableDiffusionXLPipeline",
        "EulerDiscreteScheduler",
        dict(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            timestep_spacing="leading",
            steps_offset=1,
        ),
        SDXL_VAE,
        ((CLIPTextModel, CLIP_L), (CLIPTextModelWithProjection, BIG_G)),
        settings=dict(force_zeros_for_empty_prompt=True, add_watermarker=False),
    ),
}


def published(recipe: str, family: str, component: str) -> dict[str, dict[str, Any]]:
    """The JSON files of a recipe's published teacher, by path in its pipeline folder.

    Tokenizers have their length alone.
    """
    around = SURROUNDINGS[family]
    index: dict[str, Any] = {
        "_class_name": around.pipeline,
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", around.scheduler],
        component: ["diffusers", DENOISERS[recipe]["_class_name"]],
        **around.settings,
    }
    trees = {
        "model_index.json": index,
        "scheduler/scheduler_config.json": {"_class_name": around.scheduler, **around.schedule},
        "vae/config.json": {"_class_name": "AutoencoderKL", **around.vae},
        f"{component}/config.json": DENOISERS[recipe],
    }
    for suffix, (encoder, config) in around.numbered():
        is_t5 = encoder is T5EncoderModel
        tokenizer = "T5Tokenizer" if is_t5 else "CLIPTokenizer"
        length = T5_LENGTH if is_t5 else CLIP_LENGTH
        index[f"text_encoder{suffix}"] = ["transformers", encoder.__name__]
        index[f"tokenizer{suffix}"] = ["transformers", tokenizer]
        trees[f"text_encoder{suffix}/config.json"] = config.to_dict()
        trees[f"tokenizer{suffix}/tokenizer_config.json"] = {"model_max_length": length}
    return trees
