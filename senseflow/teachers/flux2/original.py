"""FLUX.2 in the names of Black Forest Labs' files (flux-2-klein-base-4b.safetensors)."""

from typing import Any

from senseflow.teachers.original import BLACK_FOREST_LABS, OriginalNames, Rules, renamed

RULES: Rules = (
    (r"^time_guidance_embed\.timestep_embedder", "time_in"),
    (r"^time_guidance_embed\.guidance_embedder", "guidance_in"),
    (r"_modulation(_img|_txt|)\.linear", r"_modulation\1.lin"),
    # blocks of one stream
    (r"^(single_.+)\.attn\.to_qkv_mlp_proj", r"\1.linear1"),
    (r"^(single_.+)\.attn\.to_out", r"\1.linear2"),
    # blocks of two: the image's and the text's
    (r"\.ff\.linear_in", ".img_mlp.0"),
    (r"\.ff\.linear_out", ".img_mlp.2"),
    (r"\.ff_context\.linear_in", ".txt_mlp.0"),
    (r"\.ff_context\.linear_out", ".txt_mlp.2"),
    *BLACK_FOREST_LABS,
)


def name(key: str, config: dict[str, Any]) -> str:
    """The tensor that is or holds one of diffusers'; each block has its number there too."""
    return renamed(key, RULES)


ORIGINAL = OriginalNames("Black Forest Labs", "double_stream_modulation_img.lin.", "", name)
