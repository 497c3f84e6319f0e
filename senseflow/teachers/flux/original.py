"""FLUX.1 in the names of Black Forest Labs' files (flux1-dev.safetensors)."""

import re
from typing import Any

from senseflow.teachers.original import BLACK_FOREST_LABS, OriginalNames, Rules, renamed

RULES: Rules = (
    (r"^time_text_embed\.timestep_embedder", "time_in"),
    (r"^time_text_embed\.text_embedder", "vector_in"),
    (r"^time_text_embed\.guidance_embedder", "guidance_in"),
    # blocks of one stream
    (r"^(single_.+)\.(attn\.to_[qkv]|proj_mlp)\.", r"\1.linear1."),
    (r"^(single_.+)\.proj_out", r"\1.linear2"),
    (r"^(single_.+)\.norm\.linear", r"\1.modulation.lin"),
    # blocks of two: the image's and the text's
    (r"\.norm1\.linear", ".img_mod.lin"),
    (r"\.norm1_context\.linear", ".txt_mod.lin"),
    (r"\.ff\.net\.0\.proj", ".img_mlp.0"),
    (r"\.ff\.net\.2", ".img_mlp.2"),
    (r"\.ff_context\.net\.0\.proj", ".txt_mlp.0"),
    (r"\.ff_context\.net\.2", ".txt_mlp.2"),
    *BLACK_FOREST_LABS,
)


XLABS = {  # by diffusers' layer; q, k and v are one adapter, also of a single block's first layer
    r"transformer_blocks\.(\d+)\.attn\.to_([qkv])": r"double_blocks.\1.processor.qkv_lora1",
    r"transformer_blocks\.(\d+)\.attn\.add_([qkv])_proj": r"double_blocks.\1.processor.qkv_lora2",
    r"transformer_blocks\.(\d+)\.attn\.to_out\.0": r"double_blocks.\1.processor.proj_lora1",
    r"transformer_blocks\.(\d+)\.attn\.to_add_out": r"double_blocks.\1.processor.proj_lora2",
    r"single_transformer_blocks\.(\d+)\.attn\.to_([qkv])": r"single_blocks.\1.processor.qkv",
    r"single_transformer_blocks\.(\d+)\.proj_out": r"single_blocks.\1.processor.proj",
}


def adapter(layer: str) -> tuple[str, int | None] | None:
    """A layer's name in XLabs' LoRA files, without `_lora` at its end, and which third it is."""
    for pattern, name in XLABS.items():
        if found := re.fullmatch(pattern, layer):
            third = "qkv".index(found[2]) if found.re.groups > 1 else None
            return found.expand(name), third
    return None


def name(key: str, config: dict[str, Any]) -> str:
    """The tensor that is or holds one of diffusers'; each block has its number there too."""
    return renamed(key, RULES)


ORIGINAL = OriginalNames("Black Forest Labs", "double_blocks.0.img_mod.", "", name, adapter)
