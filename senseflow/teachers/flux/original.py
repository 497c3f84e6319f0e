"""FLUX.1 in the names of Black Forest Labs' files (flux1-dev.safetensors)."""

from typing import Any

from senseflow.teachers.original import OriginalNames, Rules, renamed

RULES: Rules = (
    (r"^time_text_embed\.timestep_embedder", "time_in"),
    (r"^time_text_embed\.text_embedder", "vector_in"),
    (r"^time_text_embed\.guidance_embedder", "guidance_in"),
    (r"_in\.linear_1", "_in.in_layer"),
    (r"_in\.linear_2", "_in.out_layer"),
    (r"^x_embedder", "img_in"),
    (r"^context_embedder", "txt_in"),
    (r"^norm_out\.linear", "final_layer.adaLN_modulation.1"),
    (r"^proj_out", "final_layer.linear"),
    # blocks of one stream
    (r"^single_transformer_blocks", "single_blocks"),
    (r"^(single_.+)\.(attn\.to_[qkv]|proj_mlp)\.", r"\1.linear1."),
    (r"^(single_.+)\.proj_out", r"\1.linear2"),
    (r"^(single_.+)\.norm\.linear", r"\1.modulation.lin"),
    (r"^(single_.+)\.attn\.norm_q\.weight", r"\1.norm.query_norm.scale"),
    (r"^(single_.+)\.attn\.norm_k\.weight", r"\1.norm.key_norm.scale"),
    # blocks of two: the image's and the text's
    (r"^transformer_blocks", "double_blocks"),
    (r"\.norm1\.linear", ".img_mod.lin"),
    (r"\.norm1_context\.linear", ".txt_mod.lin"),
    (r"\.attn\.to_[qkv]\.", ".img_attn.qkv."),
    (r"\.attn\.add_[qkv]_proj\.", ".txt_attn.qkv."),
    (r"\.attn\.to_out\.0", ".img_attn.proj"),
    (r"\.attn\.to_add_out", ".txt_attn.proj"),
    (r"\.attn\.norm_q\.weight", ".img_attn.norm.query_norm.scale"),
    (r"\.attn\.norm_k\.weight", ".img_attn.norm.key_norm.scale"),
    (r"\.attn\.norm_added_q\.weight", ".txt_attn.norm.query_norm.scale"),
    (r"\.attn\.norm_added_k\.weight", ".txt_attn.norm.key_norm.scale"),
    (r"\.ff\.net\.0\.proj", ".img_mlp.0"),
    (r"\.ff\.net\.2", ".img_mlp.2"),
    (r"\.ff_context\.net\.0\.proj", ".txt_mlp.0"),
    (r"\.ff_context\.net\.2", ".txt_mlp.2"),
)


def name(key: str, config: dict[str, Any]) -> str:
    """The tensor that is or holds one of diffusers'; each block has its number there too."""
    return renamed(key, RULES)


ORIGINAL = OriginalNames("Black Forest Labs", "double_blocks.0.img_mod.", "", name)
