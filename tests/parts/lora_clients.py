"""Which layers of a LoRA file three programs put to use, by the names of its tensors.

Facts read from their sources; InvokeAI's conversions and stable-diffusion.cpp's names were compared
with the programs' own functions on the keys of the full-size networks:

- ComfyUI: the tables of FLUX and of the UNet in `comfy/utils.py` at v0.26.1; `comfy/lora.py`,
  `comfy/weight_adapter/lora.py` and the table of SD3 in copies without a version. What it does not
  know it logs and leaves out.
  Z-Image's, `z_image_to_diffusers` and the keys of Lumina2 in `comfy/lora.py`, were read in copies
  without a version too, and so were Qwen-Image's keys there: every layer of it, called alike.
- InvokeAI 6.14.2: `backend/model_manager/configs/lora.py`, `backend/patches/lora_conversions`. A
  file with a layer that it does not know it refuses as a whole.
- stable-diffusion.cpp as vendored by stable-diffusion-cpp-python 0.4.7: `src/name_conversion.cpp`
  and `src/lora.hpp`. What it does not know it leaves out.

All three take alpha / rank from a tensor `X.alpha`, and 1 without one; none reads the header.
Each function says which layers of a network are not put to use as they are meant.
"""

import re

from senseflow.weights.lora_files import Component

KOHYA, PEFT = ("lora_down.weight", "lora_up.weight"), ("lora_A.weight", "lora_B.weight")

# diffusers' paths of the layers that their tables of FLUX and of SD3 know
FLUX = re.compile(
    r"transformer_blocks\.1?\d\.(attn\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)"
    r"|norm1(_context)?\.linear|ff(_context)?\.net\.(0\.proj|2))"
    r"|single_transformer_blocks\.[0-3]?\d\.(attn\.to_[qkv]|norm\.linear|proj_mlp|proj_out)"
    r"|time_text_embed\.(timestep|text|guidance)_embedder\.linear_[12]"
    r"|context_embedder|x_embedder|proj_out|norm_out\.linear"
)
SD3 = re.compile(
    r"transformer_blocks\.[0-3]?\d\.(attn2?\.(to_[qkv]|to_out\.0)|attn\.(add_[qkv]_proj|to_add_out)"
    r"|norm1(_context)?\.linear|ff(_context)?\.net\.(0\.proj|2))"
    r"|time_text_embed\.(timestep|text)_embedder\.linear_[12]"
    r"|context_embedder|pos_embed\.proj|proj_out|norm_out\.linear"
)
Z_IMAGE = re.compile(
    r"(layers|noise_refiner|context_refiner)\.\d+\.(attention\.(to_[qkv]|to_out\.0)"
    r"|feed_forward\.w[123]|adaLN_modulation\.0)|t_embedder\.mlp\.[02]|cap_embedder\.1"
    r"|all_x_embedder\.2-1|all_final_layer\.2-1\.(linear|adaLN_modulation\.1)"
)
QWEN_IMAGE = re.compile(".+")
# what stable-diffusion.cpp does not take apart when it makes dots of kohya's underscores in a UNet
WORDS = (
    "input_blocks", "middle_block", "output_blocks", "in_layers", "out_layers", "emb_layers",
    "skip_connection", "transformer_blocks", "proj_in", "proj_out", "to_q", "to_k", "to_v",
    "to_out", "conv_in", "conv_out", "down_blocks", "mid_block", "up_block", "time_emb_proj",
    "time_embedding", "conv_shortcut",
)  # fmt: skip


def has(keys: set[str], name: str, factors: tuple[str, str]) -> bool:
    return all(f"{name}.{factor}" in keys for factor in factors)


def is_sd3(part: Component) -> bool:
    return part.kohya is None and not any(x.startswith("single_") for x in part.shapes)


def by_table(part: Component, keys: set[str]) -> set[str]:
    is_z_image = any(x.startswith("noise_refiner.") for x in part.shapes)
    table = Z_IMAGE if is_z_image else SD3 if is_sd3(part) else FLUX
    if "txt_in" in part.shapes:
        table = QWEN_IMAGE
    known = {layer for layer in part.shapes if table.fullmatch(layer)}
    return {x for x in part.shapes if x not in known or not has(keys, f"transformer.{x}", PEFT)}


def comfyui(part: Component, keys: set[str]) -> set[str]:
    """A UNet's layer by its authors' or diffusers' path in kohya's form, or by diffusers' path with
    a `processor` before the projections of attention and no 0 behind `to_out`."""
    if part.kohya is None:
        return by_table(part, keys)

    def known(layer: str) -> bool:
        old = f"unet.{layer}".replace(".to_", ".processor.to_").removesuffix(".0")
        flat = [f"lora_unet_{name.replace('.', '_')}" for name in (layer, part.kohya(layer))]
        return any(has(keys, name, f) for name in (*flat, old) for f in (KOHYA, PEFT))

    return {layer for layer in part.shapes if not known(layer)}


def invokeai(part: Component, keys: set[str]) -> set[str] | None:
    """SDXL by kohya's keys alone, all with the authors' paths or all with diffusers'; FLUX by
    diffusers' keys alone, of which some must be there to tell it, and no modulation of the output.
    None: it has no LoRA of SD3."""
    if is_sd3(part):
        return None
    if part.kohya is None:
        told = ("single_transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.add_q_proj")
        alone = all(key.endswith(PEFT) for key in keys)
        recognised = alone and all(has(keys, f"transformer.{layer}", PEFT) for layer in told)
        unknown = by_table(part, keys) | ({"norm_out.linear"} & part.shapes.keys())
        return set() if recognised and not unknown else set(part.shapes)
    names = [
        {x: f"lora_unet_{n(x).replace('.', '_')}" for x in part.shapes} for n in (part.kohya, str)
    ]
    # SDXL is told by the 2048 numbers that cross attention reads
    told = any("_attn2_to_k." in key or "_attn2_to_v." in key for key in keys)
    meant = next(
        (n for n in names if keys <= {f"{x}.{f}" for x in n.values() for f in KOHYA}), None
    )
    if not told or meant is None:
        return set(part.shapes)
    return {layer for layer, name in meant.items() if not has(keys, name, KOHYA)}


def stable_diffusion_cpp(part: Component, keys: set[str]) -> set[str]:
    """A UNet's layer where the dots of the authors' path come back. Of transformers it knows all by
    diffusers' path, but does not change the places of shift and scale where diffusers has them
    the other way round than the authors."""
    if part.kohya is None:
        last = max(int(x.split(".")[1]) for x in part.shapes if x.startswith("transformer_blocks."))
        swapped = {"norm_out.linear"}
        if is_sd3(part):
            swapped.add(f"transformer_blocks.{last}.norm1_context.linear")
        return by_table(part, keys) | (swapped & part.shapes.keys())

    def dotted(name: str) -> str:
        kept = name
        for word in WORDS:
            kept = kept.replace(word, word.replace("_", "\0"))
        return kept.replace("_", ".").replace("\0", "_")

    def known(layer: str) -> bool:
        name = part.kohya(layer)
        flat = name.replace(".", "_")
        return has(keys, f"lora_unet_{flat}", KOHYA) and dotted(flat) == name

    return {layer for layer in part.shapes if not known(layer)}
