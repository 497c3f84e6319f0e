#!/bin/sh
# load_lora_adapter(..., hotswap=True) takes an adapter's weight with it: what set_adapters gave the
# adapter of that name is 1 again, without a word. And after enable_lora_hotswap(target_rank=R) a LoRA
# of rank r is saved padded to rank R without its alpha, so that a reader makes it r / R as strong.
#
# Seen with diffusers 0.42.1 and peft 0.21.2: weight .5 becomes 1; rank 4 saved at target rank 16 reads
# back at scale .25.
set -eu
packages="torch==2.15.0 diffusers==0.42.1 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0"
. "$(dirname "$0")/environment"
"$python" - <<'PYTHON'
import tempfile

from tiny_flux import LORA_OF, apart, make_lora, make_network, predict, with_lora

other = with_lora(seed=7)
full = predict(other)
other.set_adapters("a", 0.5)
half = predict(other)

network = with_lora()
network.set_adapters("a", 0.5)
network.load_lora_adapter(make_lora(seed=7), **LORA_OF, hotswap=True)
swapped = predict(network)
print("weight .5, swapped: %.2g from .5, %.2g from 1" % (apart(swapped, half), apart(swapped, full)))
assert apart(swapped, full) < 1e-5 < 1e-2 < apart(swapped, half)

padded = make_network()
padded.enable_lora_hotswap(target_rank=16)
padded.load_lora_adapter(make_lora(seed=7), **LORA_OF)
read = make_network()
with tempfile.TemporaryDirectory() as folder:
    padded.save_lora_adapter(folder, adapter_name="a")
    read.load_lora_adapter(folder, **LORA_OF, weight_name="pytorch_lora_weights.safetensors")
scale = read.transformer_blocks[0].attn.to_q.scaling["a"]
print(
    "rank 4 at target rank 16: %.2g from the LoRA as loaded; saved and read %.2g, scale %s"
    % (apart(predict(padded), full), apart(predict(read), full), scale)
)
assert apart(predict(padded), full) < 1e-5 < 1e-2 < apart(predict(read), full) and scale == 0.25
PYTHON
