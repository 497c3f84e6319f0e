"""FLUX.2 in the names of Black Forest Labs' files (flux-2-klein-base-4b.safetensors)."""

from typing import Any

from senseflow.teachers.original import OriginalNames, Rules, renamed

RULES: Rules = (
    (r"^time_guidance_embed\.timestep_embedder", "time_in"),
    (r"^time_guidance_embed\.guidance_embedder", "guidance_in"),
    (r"_in\.linear_1", "_in.in_layer"),
    (r"_in\.linear_2", "_in.out_layer"),
    (r"^x_embedder", "img_in"),
    (r"^context_embedder", "txt_in"),
    (r"_modulation(_img|_txt|)\.linear", r"_modulation\1.lin"),
    (r"^norm_out\.linear", "final_layer.adaLN_modulation.1"),
    (r"^proj_out", "final_layer.linear"),
    # blocks of one stream
    (r"^single_transformer_blocks", "single_blocks"),
    (r"^(single_.+)\.attn\.to_qkv_mlp_proj", r"\1.linear1"),
    (r"^(single_.+)\.attn\.to_out", r"\1.linear2"),
    (r"^(single_.+)\.attn\.norm_q\.weight", r"\1.norm.query_norm.scale"),
    (r"^(single_.+)\.attn\.norm_k\.weight", r"\1.norm.key_norm.scale"),
    # blocks of two: the image's and the text's
    (r"^transformer_blocks", "double_blocks"),
    (r"\.attn\.to_[qkv]\.", ".img_attn.qkv."),
    (r"\.attn\.add_[qkv]_proj\.", ".txt_attn.qkv."),
    (r"\.attn\.to_out\.0", ".img_attn.proj"),
    (r"\.attn\.to_add_out", ".txt_attn.proj"),
    (r"\.attn\.norm_q\.weight", ".img_attn.norm.query_norm.scale"),
    (r"\.attn\.norm_k\.weight", ".img_attn.norm.key_norm.scale"),
    (r"\.attn\.norm_added_q\.weight", ".txt_attn.norm.query_norm.scale"),
    (r"\.attn\.norm_added_k\.weight", ".txt_attn.norm.key_norm.scale"),
    (r"\.ff\.linear_in", ".img_mlp.0"),
    (r"\.ff\.linear_out", ".img_mlp.2"),
    (r"\.ff_context\.linear_in", ".txt_mlp.0"),
    (r"\.ff_context\.linear_out", ".txt_mlp.2"),
)


def name(key: str, config: dict[str, Any]) -> str:
    """The tensor that is or holds one of diffusers'; each block has its number there too."""
    return renamed(key, RULES)


ORIGINAL = OriginalNames("Black Forest Labs", "double_stream_modulation_img.lin.", "", name)
