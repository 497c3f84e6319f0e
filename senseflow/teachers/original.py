"""The names of a family's tensors in its authors' own files. Light: names, no tensors.

A file of the authors holds some of diffusers' tensors in one: `senseflow.weights.original` finds
which rows of it each of them is.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Rules = tuple[tuple[str, str], ...]  # regular expressions and what is put in their place, in turn


@dataclass(frozen=True)
class OriginalNames:
    """How the authors' files name a network's tensors."""

    title: str  # whose names they are
    mark: str | None  # how some name begins, and none of another family's; None: as in diffusers
    prefix: str  # before every name in the file that they publish
    name: Callable[[str, dict[str, Any]], str]  # by diffusers' name and the network's config
    # How XLabs' LoRA files name a layer of diffusers', and which third of theirs it is, None: all.
    adapter: Callable[[str], tuple[str, int | None] | None] = lambda layer: None

    def of(self, config: dict[str, Any]) -> Callable[[str], str]:
        """The authors' name by diffusers', of a network with this config."""
        return lambda key: self.name(key, config)


def renamed(key: str, rules: Rules) -> str:
    """A name after all rules, each on what the one before it left."""
    for pattern, put in rules:
        key = re.sub(pattern, put, key)
    return key


# FLUX.1's and FLUX.2's files share these; what the two name differently each says before them.
BLACK_FOREST_LABS: Rules = (
    (r"_in\.linear_1", "_in.in_layer"),
    (r"_in\.linear_2", "_in.out_layer"),
    (r"^x_embedder", "img_in"),
    (r"^context_embedder", "txt_in"),
    (r"^norm_out\.linear", "final_layer.adaLN_modulation.1"),
    (r"^proj_out", "final_layer.linear"),
    # blocks of one stream
    (r"^single_transformer_blocks", "single_blocks"),
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
)
