"""Z-Image in the names of its authors' files, such as z_image_bf16.safetensors."""

from typing import Any

from senseflow.teachers.original import OriginalNames, Rules, renamed

RULES: Rules = (
    (r"^all_x_embedder\.2-1\.", "x_embedder."),
    (r"^all_final_layer\.2-1\.", "final_layer."),
    (r"\.attention\.to_[qkv]\.", ".attention.qkv."),
    (r"\.attention\.to_out\.0\.", ".attention.out."),
    (r"\.attention\.norm_([qk])\.", r".attention.\1_norm."),
)


def name(key: str, config: dict[str, Any]) -> str:
    """The tensor that is or holds one of diffusers'; all others are called alike."""
    return renamed(key, RULES)


ORIGINAL = OriginalNames("Tongyi-MAI", "layers.0.attention.qkv.", "model.diffusion_model.", name)
