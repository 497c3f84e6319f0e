"""SD3.5 Medium and Large on the command line: StableDiffusion3Pipeline with a student inside."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from senseflow.sampling.flow import make_scheduler, sample
from senseflow.sampling.levels import SIGMAS
from senseflow.sampling.plan import (
    Family,
    Sides,
    base_config,
    stated_length,
    vae_factor,
)

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusion3Pipeline
    from torch import nn

ANCHORS = [1.0, 0.9, 0.75, 0.5]  # shift 3 of 1, .75, .5, .25
SIDE = 1024  # pixels
T5_LENGTH = 256  # the pipeline's default


def sides(base: Path, config: dict[str, Any] | None) -> Sides:
    """Multiples of a patch in pixels, as far as the table of positions reaches."""
    config = config or base_config(base, "transformer")
    factor, patch = vae_factor(base), config.get("patch_size", 2)
    default = config["sample_size"] * factor if "sample_size" in config else SIDE
    places = config.get("pos_embed_max_size")
    return Sides(factor * patch, default, places and places * factor * patch)


def is_medium(base: Path) -> bool:
    """Medium's first blocks have dual attention; a base without its transformer may be either."""
    config = base_config(base, "transformer")
    return not config or bool(config.get("dual_attention_layers"))


def is_large(base: Path) -> bool:
    """Large has no dual attention."""
    return not base_config(base, "transformer").get("dual_attention_layers")


def t5_length(base: Path) -> int:
    """256 for SD3.5."""
    return stated_length(base / "tokenizer_3", T5_LENGTH)


def open_pipeline(
    base: Path, network: "nn.Module | None", dtype: "torch.dtype"
) -> "StableDiffusion3Pipeline":
    """The base's pipeline; with a network, the base's own transformer is not read."""
    from diffusers import StableDiffusion3Pipeline

    replaced = {} if network is None else {"transformer": network}
    return StableDiffusion3Pipeline.from_pretrained(base, torch_dtype=dtype, **replaced)


SD35 = Family(
    name="sd35",
    title="SD3.5 Medium",
    script="scripts_sd35/test_senseflow_sd35.py",
    pipeline_class="StableDiffusion3Pipeline",
    network_class="SD3Transformer2DModel",
    component="transformer",
    is_this_size=is_medium,
    t5_length=t5_length,
    key_mark="pos_embed.proj.",
    blocks=("JointTransformerBlock",),
    base_flag="--sd35_ckpt",
    config_flag="--transformer_config",
    levels=SIGMAS,
    teacher_steps=40,
    teacher_guidance=4.5,
    default_anchors=lambda base: ANCHORS,
    sides=sides,
    make_scheduler=make_scheduler,
    open_pipeline=open_pipeline,
    sample=sample,
)

SD35_LARGE = dataclasses.replace(
    SD35,
    title="SD3.5 Large",
    script="scripts_sd35/test_senseflow_sd35_large.py",
    teacher_steps=50,
    teacher_guidance=3.5,
    is_this_size=is_large,
)
