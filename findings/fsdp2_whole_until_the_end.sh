#!/bin/sh
# fully_shard reshards a unit, and reduces its gradient, in a backward when the gradient of its
# input is there. A unit whose input needs none (a classifier of frozen features) waits for the end
# of the whole backward: so do all others like it, each with its weights and its gradient whole.
#
# Seen with torch 2.15.0 on two ranks, eight layers side by side, asked in the backward of the one
# that is last in it: 0 of the other seven are whole where their inputs need a gradient, 7 of 7 where
# they do not; 0 where each has a backward of its own.
set -eu
packages="torch==2.15.0 numpy"
. "$(dirname "$0")/environment"
cat > "$folder/seen.py" <<'PYTHON'
import sys
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

NUM = 8


class Heads(nn.ModuleList):
    def forward(self, inputs):  # of some of them
        return [self[number](x) for number, x in inputs.items()]


def whole(layers):
    return sum(not isinstance(layer.weight, DTensor) for layer in layers)


def look(rank, store, queue):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    heads = Heads(nn.Linear(16, 16) for _ in range(NUM))
    for head in heads:
        fully_shard(head)
    fully_shard(heads)
    found = []
    for needed in (True, False):
        outputs = heads({n: torch.randn(2, 16, requires_grad=needed) for n in range(NUM)})
        outputs[0].register_hook(lambda gradient: found.append(whole(list(heads)[1:])))
        sum(output.sum() for output in outputs).backward()
    for number in reversed(range(NUM)):
        (output,) = heads({number: torch.randn(2, 16)})
        if number == 0:
            output.register_hook(lambda gradient: found.append(whole(list(heads)[1:])))
        output.sum().backward()
    if rank == 0:
        queue.put(found)


if __name__ == "__main__":
    print("torch", torch.__version__)
    assert torch.__version__.startswith("2.15.0"), "another version than the pinned one"
    queue = mp.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(look, (folder + "/store", queue), nprocs=2)
    found = queue.get()
    print("whole of 7, inputs with gradient, without, a backward for each:", found)
    sys.exit(found != [0, NUM - 1, 0])
PYTHON
OMP_NUM_THREADS=1 "$python" "$folder/seen.py"
