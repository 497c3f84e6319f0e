"""SD3.5 in the names of Stability AI's files, such as sd3.5_large.safetensors."""

from typing import Any

from senseflow.teachers.original import OriginalNames, Rules, renamed

RULES: Rules = (
    (r"^pos_embed\.pos_embed", "pos_embed"),
    (r"^pos_embed\.proj", "x_embedder.proj"),
    (r"^time_text_embed\.timestep_embedder", "t_embedder"),
    (r"^time_text_embed\.text_embedder", "y_embedder"),
    (r"_embedder\.linear_1", "_embedder.mlp.0"),
    (r"_embedder\.linear_2", "_embedder.mlp.2"),
    (r"^norm_out\.linear", "final_layer.adaLN_modulation.1"),
    (r"^proj_out", "final_layer.linear"),
    # blocks of two streams: the image's and the text's
    (r"^transformer_blocks", "joint_blocks"),
    (r"\.norm1\.linear", ".x_block.adaLN_modulation.1"),
    (r"\.norm1_context\.linear", ".context_block.adaLN_modulation.1"),
    (r"\.(attn2?)\.to_[qkv]\.", r".x_block.\1.qkv."),
    (r"\.(attn2?)\.to_out\.0", r".x_block.\1.proj"),
    (r"\.(attn2?)\.norm_([qk])\.", r".x_block.\1.ln_\2."),
    (r"\.attn\.add_[qkv]_proj\.", ".context_block.attn.qkv."),
    (r"\.attn\.to_add_out", ".context_block.attn.proj"),
    (r"\.attn\.norm_added_([qk])\.", r".context_block.attn.ln_\1."),
    (r"\.ff\.net\.0\.proj", ".x_block.mlp.fc1"),
    (r"\.ff\.net\.2", ".x_block.mlp.fc2"),
    (r"\.ff_context\.net\.0\.proj", ".context_block.mlp.fc1"),
    (r"\.ff_context\.net\.2", ".context_block.mlp.fc2"),
)


def name(key: str, config: dict[str, Any]) -> str:
    """The tensor that is or holds one of diffusers'; each block has its number there too."""
    return renamed(key, RULES)


ORIGINAL = OriginalNames("Stability AI", "joint_blocks.", "model.diffusion_model.", name)
