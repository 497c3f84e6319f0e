"""SDXL in the names of Stability AI's file, sd_xl_base_1.0.safetensors: latent diffusion's.

Blocks are counted through there, and not level by level.
"""

import re
from typing import Any

from senseflow.teachers.original import OriginalNames, Rules, renamed

RULES: Rules = (
    (r"^time_embedding\.linear_1", "time_embed.0"),
    (r"^time_embedding\.linear_2", "time_embed.2"),
    (r"^add_embedding\.linear_1", "label_emb.0.0"),
    (r"^add_embedding\.linear_2", "label_emb.0.2"),
    (r"^conv_in\.", "input_blocks.0.0."),
    (r"^conv_norm_out\.", "out.0."),
    (r"^conv_out\.", "out.2."),
    (r"(\.resnets\.\d+)\.norm1\.", r"\1.in_layers.0."),
    (r"(\.resnets\.\d+)\.conv1\.", r"\1.in_layers.2."),
    (r"(\.resnets\.\d+)\.time_emb_proj\.", r"\1.emb_layers.1."),
    (r"(\.resnets\.\d+)\.norm2\.", r"\1.out_layers.0."),
    (r"(\.resnets\.\d+)\.conv2\.", r"\1.out_layers.3."),
    (r"(\.resnets\.\d+)\.conv_shortcut\.", r"\1.skip_connection."),
    (r"^mid_block\.resnets\.0", "middle_block.0"),
    (r"^mid_block\.attentions\.0", "middle_block.1"),
    (r"^mid_block\.resnets\.1", "middle_block.2"),
)
PART = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.")


def name(key: str, config: dict[str, Any]) -> str:
    """The same tensor's name: only names differ."""
    key = renamed(key, RULES)
    if not (found := PART.match(key)):
        return key
    side, level, part, number = found[1], int(found[2]), found[3], int(found[4])
    rest, each = key[found.end() :], config["layers_per_block"] + 1
    if part == "downsamplers":
        return f"input_blocks.{each * (level + 1)}.0.{rest.replace('conv.', 'op.')}"
    if part == "upsamplers":  # in a level's last block, behind its attention if it has one
        place = 2 if "CrossAttn" in config["up_block_types"][level] else 1
        return f"output_blocks.{each * (level + 1) - 1}.{place}.{rest}"
    place = 0 if part == "resnets" else 1
    if side == "down":
        return f"input_blocks.{1 + each * level + number}.{place}.{rest}"
    return f"output_blocks.{each * level + number}.{place}.{rest}"


def layer_name(layer: str, config: dict[str, Any]) -> str:
    """A layer's name: of its weight, without that."""
    return name(f"{layer}.weight", config).removesuffix(".weight")


ORIGINAL = OriginalNames("Stability AI", "label_emb.", "model.diffusion_model.", name)
