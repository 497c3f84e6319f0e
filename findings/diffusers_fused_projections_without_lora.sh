#!/bin/sh
# fuse_qkv_projections() of a transformer leaves a LoRA of its attention out without a word: the fused
# projection is made of the base's weights, and the adapters stay behind on layers that are not called
# any more. The other way about, a LoRA that is loaded after it is put on those same layers. Merged
# before (fuse_lora) it is in the fused weights, and there it stays whatever unfuse_lora and
# set_adapters are told.
#
# Seen with diffusers 0.42.1 and peft 0.21.2 on a small FLUX: outputs equal the base's to the bit in
# both orders.
set -eu
packages="torch==2.15.0 diffusers==0.42.1 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0"
. "$(dirname "$0")/environment"
"$python" - <<'PYTHON'
from tiny_flux import LORA_OF, apart, make_lora, make_network, predict, with_lora

base, full = predict(make_network()), predict(with_lora())

network = with_lora()
network.fuse_qkv_projections()
lora_first = predict(network)

network = make_network()
network.fuse_qkv_projections()
network.load_lora_adapter(make_lora(), **LORA_OF)
qkv_first = predict(network)

network = with_lora()
network.fuse_lora()
network.fuse_qkv_projections()
merged = predict(network)
network.unfuse_lora()
network.set_adapters("a", 0.0)
switched_off = predict(network)

for name, found in (
    ("LoRA, then fused projections", lora_first),
    ("fused projections, then LoRA", qkv_first),
    ("LoRA merged, then fused projections", merged),
    ("... unmerged, its weight 0", switched_off),
):
    print("%s: %.2g from the base, %.2g from the LoRA" % (name, apart(found, base), apart(found, full)))
assert apart(base, full) > 1e-2
assert apart(lora_first, base) == apart(qkv_first, base) == 0
assert apart(merged, full) < 1e-5 and apart(switched_off, full) < 1e-5
PYTHON
