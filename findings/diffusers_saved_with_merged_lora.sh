#!/bin/sh
# fuse_lora() followed by save_pretrained(), without unload_lora_weights() between them, writes a
# folder whose merged weights have peft's names (base_layer). from_pretrained reads it with no more
# than a warning and leaves those layers as they were initialised, at random.
#
# Seen with diffusers 0.42.1 and peft 0.21.2: outputs of what was read are far from the merged network's
# and from the base's; unloaded before, they equal the merged network's.
set -eu
packages="torch==2.15.0 diffusers==0.42.1 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0"
. "$(dirname "$0")/environment"
"$python" - <<'PYTHON'
import tempfile

from diffusers import FluxTransformer2DModel
from safetensors import safe_open

from tiny_flux import apart, make_network, predict, with_lora

base, network = predict(make_network()), with_lora()
full = predict(network)
network.fuse_lora()
found = []
for unloaded in (False, True):
    if unloaded:
        network.unload_lora()
    with tempfile.TemporaryDirectory() as folder:
        network.save_pretrained(folder)
        with safe_open(f"{folder}/diffusion_pytorch_model.safetensors", "pt") as file:
            keys = [key for key in file.keys() if key.startswith("transformer_blocks.0.attn.to_q.")]
        read = predict(FluxTransformer2DModel.from_pretrained(folder, low_cpu_mem_usage=False))
    found.append((apart(read, full), apart(read, base)))
    print(
        "unloaded first: %s; keys %s; read %.2g from merged, %.2g from the base"
        % (unloaded, keys, *found[-1])
    )
assert not min(found[0]) < 1e-2  # what was in memory may be NaN
assert found[1][0] < 1e-5
PYTHON
