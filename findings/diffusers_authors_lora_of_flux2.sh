#!/bin/sh
# diffusers loads LoRA files by the names of FLUX.2's authors (ai-toolkit, ComfyUI, kohya's form) and
# does not make of them what its own converter makes of whole weights by the same names:
# - final_layer.adaLN_modulation.1 has shift and scale in another order than norm_out.linear. Whole
#   weights are turned, a LoRA is not: its two halves act on each other's place. Nothing is said.
# - in kohya's form this layer and the three modulations are left out;
# - by dotted names with lora_down and lora_up (as ComfyUI extracts them) everything is left out, with a
#   warning that calls it safe to ignore;
# - by dotted names with lora_A, lora_B and alphas it is a ValueError.
# Z-Image's, by the names of its authors' file with lora_A and lora_B, lose the fused attention (qkv) and
# its output, with a warning.
#
# Seen with torch 2.15.0, diffusers 0.42.1, transformers 5.23.0 and peft 0.21.2.
set -eu
packages="torch==2.15.0 diffusers==0.42.1 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0"
. "$(dirname "$0")/environment"
OMP_NUM_THREADS=1 "$python" - <<'PYTHON'
import inspect
import logging

import diffusers
import peft
import torch
import transformers
from diffusers.loaders.single_file_utils import (
    convert_flux2_transformer_checkpoint_to_diffusers,
    convert_z_image_transformer_checkpoint_to_diffusers,
)

versions = (torch.__version__.split("+")[0], *(x.__version__ for x in (diffusers, transformers, peft)))
print("torch %s, diffusers %s, transformers %s, peft %s" % versions)
assert versions == ("2.15.0", "0.42.1", "5.23.0", "0.21.2"), "other versions than the pinned ones"

torch.manual_seed(0)
RANK = 2
flux2 = diffusers.Flux2Transformer2DModel(
    patch_size=1, in_channels=8, num_layers=1, num_single_layers=1, attention_head_dim=8,
    num_attention_heads=2, joint_attention_dim=16, timestep_guidance_channels=16,
    mlp_ratio=3.0, axes_dims_rope=(2, 2, 2, 2), guidance_embeds=False,
)
z_image = diffusers.ZImageTransformer2DModel(
    in_channels=4, dim=16, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
    axes_dims=[2, 4, 2], axes_lens=[64, 64, 64],
)
# of each layer of the authors': inputs, outputs
FLUX2 = {
    "img_in": (8, 16), "double_stream_modulation_img.lin": (16, 96),
    "double_stream_modulation_txt.lin": (16, 96), "single_stream_modulation.lin": (16, 48),
    "double_blocks.0.img_attn.qkv": (16, 48), "double_blocks.0.img_attn.proj": (16, 16),
    "single_blocks.0.linear2": (64, 16), "final_layer.adaLN_modulation.1": (16, 32),
}
Z_IMAGE = {"layers.0.attention.qkv": (16, 48), "layers.0.attention.out": (16, 16),
           "layers.0.feed_forward.w1": (16, 42)}
heard = []
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: heard.append(record.getMessage())
logging.getLogger("diffusers").handlers = [handler]


def loaded(network, kind, file):
    """What each weight has changed by."""
    copy = type(network).from_config(network.config)
    copy.load_state_dict(network.state_dict())
    parts = dict.fromkeys(list(inspect.signature(kind.__init__).parameters)[1:])
    parts |= {"transformer": copy, "scheduler": diffusers.FlowMatchEulerDiscreteScheduler()}
    parts = {k: v for k, v in parts.items() if k not in ("is_distilled",)}
    heard.clear()
    pipe = kind(**parts)
    pipe.load_lora_weights(dict(file))
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    own = network.state_dict()
    return {k: v - own[k] for k, v in copy.state_dict().items()}


def compare(network, kind, convert, layers, name, down, up, alpha):
    """Layers that are not what the converter makes of the whole weights, by what is wrong."""
    pairs = {x: (torch.randn(RANK, i), torch.randn(o, RANK)) for x, (i, o) in layers.items()}
    whole = {f"{x}.weight": b @ a for x, (a, b) in pairs.items()}
    file = {name(x) + end: t for x, (a, b) in pairs.items() for end, t in ((down, a), (up, b))}
    if alpha:
        file |= {f"{name(x)}.alpha": torch.tensor(float(RANK)) for x in pairs}
    try:
        found = loaded(network, kind, file)
    except ValueError:
        return "ValueError"
    wrong = {}
    for key, update in convert(whole).items():
        got = found[key]
        if not torch.allclose(got, update, atol=1e-4):
            turned = torch.allclose(torch.cat(got.chunk(2)[::-1]), update, atol=1e-4)
            kind_of = "turned" if turned else "left out" if got.abs().max() == 0 else "other"
            wrong.setdefault(kind_of, []).append(key.removesuffix(".weight"))
    return wrong


def dotted(layer):
    return f"diffusion_model.{layer}"


def kohya(layer):
    return "lora_unet_" + layer.replace(".", "_")


A_B, DOWN_UP = (".lora_A.weight", ".lora_B.weight"), (".lora_down.weight", ".lora_up.weight")
klein = (flux2, diffusers.Flux2KleinPipeline, convert_flux2_transformer_checkpoint_to_diffusers, FLUX2)

seen = compare(*klein, dotted, *A_B, False)
print("FLUX.2, lora_A and lora_B: %s; warnings: %d" % (seen, len(heard)))
assert seen == {"turned": ["norm_out.linear"]} and not heard

seen = compare(*klein, kohya, *DOWN_UP, True)
print("FLUX.2, kohya's form: %s; warnings: %d" % (seen, len(heard)))
modulations = ["img", "txt"]
assert sorted(seen["left out"]) == sorted([
    *(f"double_stream_modulation_{x}.linear" for x in modulations),
    "single_stream_modulation.linear", "norm_out.linear",
]) and len(seen) == 1

seen = compare(*klein, dotted, *DOWN_UP, False)
print("FLUX.2, dotted, lora_down and lora_up: %d layers left out" % len(seen["left out"]))
assert len(seen) == 1 and len(seen["left out"]) == 10 and any("safe to ignore" in x for x in heard)

seen = compare(*klein, dotted, *A_B, True)
print("FLUX.2, dotted, lora_A, lora_B and alpha: %s" % seen)
assert seen == "ValueError"

z = (z_image, diffusers.ZImagePipeline, convert_z_image_transformer_checkpoint_to_diffusers, Z_IMAGE)
seen = compare(*z, dotted, *A_B, False)
print("Z-Image, lora_A and lora_B: %s; warnings: %d" % (seen, len(heard)))
attention = [f"layers.0.attention.{x}" for x in ("to_q", "to_k", "to_v", "to_out.0")]
assert sorted(seen["left out"]) == sorted(attention) and len(seen) == 1 and heard
PYTHON
