#!/bin/sh
# A call with joint_attention_kwargs={"scale": 0}, which draws the base alone once, forgets the weight
# that set_adapters gave the LoRA: from the next call on it acts at 1. Any other scale is undone after
# its call, and the weight stays.
#
# Seen with diffusers 0.42.1 and peft 0.21.2: at weight .5, the call after one with 0 equals weight 1.
set -eu
packages="torch==2.15.0 diffusers==0.42.1 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0"
. "$(dirname "$0")/environment"
"$python" - <<'PYTHON'
from tiny_flux import apart, predict, with_lora

network = with_lora()
full = predict(network)
network.set_adapters("a", 0.5)
half = predict(network)
predict(network, joint_attention_kwargs={"scale": 0.25})
after_quarter = predict(network)
predict(network, joint_attention_kwargs={"scale": 0.0})
after_none = predict(network)
print("after a call with .25: %.2g from weight .5" % apart(after_quarter, half))
print(
    "after a call with 0: %.2g from weight .5, %.2g from weight 1"
    % (apart(after_none, half), apart(after_none, full))
)
assert apart(after_quarter, half) < 1e-5 < 1e-2 < apart(after_none, half)
assert apart(after_none, full) < 1e-5
PYTHON
