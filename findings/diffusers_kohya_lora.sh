#!/bin/sh
# diffusers reads LoRA files in the form of kohya's sd-scripts, and loses parts of valid ones:
# - SDXL: where alpha is not the same in all layers, as after resizing by rank, the layers of
#   attention get the most frequent alpha in place of their own. Their alphas are kept under names
#   that no layer has (peft warns that it ignored them).
# - FLUX: layers outside of the blocks (img_in, txt_in, the final layer) are converted, but without
#   the prefix `transformer.`, by which the ones to load are then chosen. Nothing is said.
#
# Seen with torch 2.15.0, diffusers 0.42.1, transformers 5.23.0 and peft 0.21.2: alpha / rank of a
# layer of attention 1.0 in place of 0.25, and 2 of 4 layers loaded.
set -eu
packages="torch==2.15.0 diffusers==0.42.1 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0"
. "$(dirname "$0")/environment"
OMP_NUM_THREADS=1 "$python" - <<'PYTHON'
import logging
import warnings

import diffusers
import peft
import torch
import transformers
from diffusers import (
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

versions = (torch.__version__.split("+")[0], *(x.__version__ for x in (diffusers, transformers, peft)))
print("torch %s, diffusers %s, transformers %s, peft %s" % versions)
assert versions == ("2.15.0", "0.42.1", "5.23.0", "0.21.2"), "other versions than the pinned ones"
RANK = 4


def kohya(name, inputs, outputs, alpha):
    tensors = {
        "lora_down.weight": torch.ones(RANK, inputs),
        "lora_up.weight": torch.ones(outputs, RANK),
        "alpha": torch.tensor(alpha),
    }
    return {f"lora_unet_{name}.{end}": value for end, value in tensors.items()}


unet = UNet2DConditionModel(
    sample_size=8, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=8, cross_attention_dim=32,
)
block = "down_blocks_1_attentions_0_transformer_blocks_0"
sdxl = {
    **kohya(f"{block}_attn1_to_q", 64, 64, 1.0),
    **kohya(f"{block}_ff_net_2", 256, 64, 4.0),
    **kohya("mid_block_attentions_0_transformer_blocks_0_ff_net_2", 256, 64, 4.0),
}
state, alphas = StableDiffusionXLPipeline.lora_state_dict(sdxl, unet_config=unet.config)
with warnings.catch_warnings(record=True):
    warnings.simplefilter("always")
    StableDiffusionXLPipeline.load_lora_into_unet(state, alphas, unet)
scales = {
    name.rpartition("transformer_blocks.0.")[2]: module.scaling["default_0"]
    for name, module in unet.named_modules()
    if hasattr(module, "scaling")
}
print("SDXL, alpha / rank as loaded: %s" % scales)
assert scales == {"attn1.to_q": 1.0, "ff.net.2": 1.0}, "attention has its own alpha now: 0.25"

flux = FluxTransformer2DModel(
    num_layers=1, num_single_layers=0, attention_head_dim=16, num_attention_heads=4,
    joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
)
file = {
    **kohya("double_blocks_0_img_attn_proj", 64, 64, 4.0),
    **kohya("double_blocks_0_img_mlp_2", 256, 64, 4.0),
    **kohya("img_in", 64, 64, 4.0),
    **kohya("final_layer_linear", 64, 64, 4.0),
}
heard = []
handler = logging.Handler(logging.WARNING)
handler.emit = heard.append
logging.getLogger("diffusers").addHandler(handler)
FluxPipeline.load_lora_into_transformer(FluxPipeline.lora_state_dict(file), None, flux)
loaded = [name for name, module in flux.named_modules() if hasattr(module, "scaling")]
print("FLUX, loaded of 4 layers: %s; warnings: %d" % (", ".join(loaded), len(heard)))
assert sorted(loaded) == ["transformer_blocks.0.attn.to_out.0", "transformer_blocks.0.ff.net.2"]
PYTHON
