#!/bin/sh
# torch.distributed.checkpoint's get_optimizer_state_dict and get_state_dict do not only read: an
# optimizer that has not stepped yet takes a step, with gradients of zero and a rate of 0, so that there
# is a state to give. Weights stay, but the state's count is 1, and the bias correction of the first
# real step is that of the second. Whoever saves before the first step (step 0, or a network that
# learns every fifth iteration) trains on otherwise than whoever does not.
#
# Seen with torch 2.15.0: of AdamW the first update is .744 of what it is, and with betas (0, .999), as
# adversaries have them, 1.414, above the rate. Of SGD it is the same.
set -eu
packages="torch==2.15.0 numpy"
. "$(dirname "$0")/environment"
OMP_NUM_THREADS=1 "$python" - <<'PYTHON'
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

version = torch.__version__.split("+")[0]
print("torch", version)
assert version == "2.15.0", "another version than the pinned one"


def first_update(kind, read, **more):
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 4, bias=False)
    optimizer = kind(layer.parameters(), lr=1e-2, **more)
    if read:
        get_optimizer_state_dict(layer, optimizer)
    before = layer.weight.detach().clone()
    layer(torch.ones(2, 4)).square().sum().backward()
    optimizer.step()
    return (layer.weight - before).abs().mean().item()


ratios = []
for kind, more in (
    (torch.optim.AdamW, {"weight_decay": 0.0}),
    (torch.optim.AdamW, {"weight_decay": 0.0, "betas": (0.0, 0.999)}),
    (torch.optim.SGD, {"momentum": 0.9}),
):
    plain, read = first_update(kind, False, **more), first_update(kind, True, **more)
    ratios.append(read / plain)
    print("%s %s: first update %.4g, after a read %.4g (%.3f)" % (kind.__name__, more, plain, read, ratios[-1]))
# (1 - b1) / (1 - b1^2) over sqrt((1 - b2) / (1 - b2^2)), of b1 = .9 or 0 and b2 = .999
assert abs(ratios[0] - 0.7441) < 2e-3 and abs(ratios[1] - 1.4139) < 2e-3 and ratios[2] == 1
PYTHON
