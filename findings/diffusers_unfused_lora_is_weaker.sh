#!/bin/sh
# fuse_lora(lora_scale=s) multiplies an adapter's own scale by s, and unfuse_lora() does not put it
# back: after it the LoRA acts at strength s, and each further pair of calls takes a factor s more.
#
# Seen with diffusers 0.42.1 and peft 0.21.2: at s = .5 the scale is .5, .25, .125 after one, two and
# three pairs of calls.
set -eu
packages="torch==2.15.0 diffusers==0.42.1 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0"
. "$(dirname "$0")/environment"
"$python" - <<'PYTHON'
from tiny_flux import apart, predict, with_lora

network = with_lora()
full, scales = predict(network), []
for number in range(3):
    network.fuse_lora(lora_scale=0.5)
    network.unfuse_lora()
    scales.append(network.transformer_blocks[0].attn.to_q.scaling["a"])
    print("pair %d: scale %s, %.2g from full strength" % (number + 1, scales[-1], apart(predict(network), full)))
assert scales == [0.5, 0.25, 0.125] and apart(predict(network), full) > 1e-2
PYTHON
