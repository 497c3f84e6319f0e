#!/bin/sh
# set_model_state_dict of torch.distributed.checkpoint, given a full state dict for a network that is
# sharded with fully_shard, puts DTensors into the caller's own dict in the place of its tensors. With
# broadcast_from_rank0 they are the network's parameters themselves: the dict follows training, and a
# second network (a student, a fake score begun as its teacher) cannot be filled from it.
#
# Seen with torch 2.15.0, on one rank: after a change of the network the dict's 1 is 2, and the second
# call is a NotImplementedError; without the broadcast the dict holds shards, and the second works.
set -eu
packages="torch==2.15.0 numpy"
. "$(dirname "$0")/environment"
OMP_NUM_THREADS=1 "$python" - <<'PYTHON'
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import fully_shard

version = torch.__version__.split("+")[0]
print("torch", version)
assert version == "2.15.0", "another version than the pinned one"
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

found = []
for broadcast in (False, True):
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcast)
    teacher, student = (fully_shard(nn.Linear(3, 2, bias=False)) for _ in range(2))
    full = {"weight": torch.ones(2, 3)}
    set_model_state_dict(teacher, full, options=options)
    with torch.no_grad():
        teacher.weight.mul_(2)
    kind, value = type(full["weight"]).__name__, full["weight"].full_tensor().mean().item()
    try:
        set_model_state_dict(student, full, options=options)
        second = "%g" % student.weight.full_tensor().mean().item()
    except NotImplementedError as error:
        second = type(error).__name__
    print("broadcast_from_rank0=%s: the dict holds a %s of %g" % (broadcast, kind, value))
    print("    a second network from it:", second)
    found.append((kind, value, second))
dist.destroy_process_group()
assert found == [("DTensor", 1.0, "1"), ("DTensor", 2.0, "NotImplementedError")]
PYTHON
