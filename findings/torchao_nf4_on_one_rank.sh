#!/bin/sh
# fully_shard on one rank takes torchao's NF4Tensor and fails at the first forward: torch skips the
# gathering there and hands `fsdp_post_all_gather` one tensor, where the class takes the three that
# its `fsdp_pre_all_gather` named.
#
# Seen with torch 2.15.0 and torchao 0.18.0: "ValueError: not enough values to unpack (expected 3,
# got 1)" on one rank; on two the forward is that of the layer before it was sharded.
set -eu
packages="torch==2.15.0 torchao==0.18.0 numpy"
. "$(dirname "$0")/environment"
cat > "$folder/seen.py" <<'PYTHON'
import sys
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import fully_shard
from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4


def forward(rank, num, store, queue):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=num)
    torch.manual_seed(0)
    layer = nn.Linear(128, 256, bias=False)
    layer.weight = nn.Parameter(to_nf4(layer.weight.detach(), 64, 64), requires_grad=False)
    x = torch.randn(3, 128)
    before = layer(x)
    fully_shard(layer)
    try:
        said = "as before" if torch.equal(layer(x), before) else "something else"
    except ValueError as error:
        said = str(error)
    if rank == 0:
        queue.put(said)


if __name__ == "__main__":
    import torchao

    print("torch %s, torchao %s" % (torch.__version__, torchao.__version__))
    assert torch.__version__.startswith("2.15.0"), "another version than the pinned one"
    assert torchao.__version__.startswith("0.18.0"), "another version than the pinned one"
    found = {}
    for num in (1, 2):
        queue = mp.get_context("spawn").SimpleQueue()
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(forward, (num, folder + "/store", queue), nprocs=num)
        found[num] = queue.get()
        print("%d ranks: %s" % (num, found[num]))
    expected = {1: "not enough values to unpack (expected 3, got 1)", 2: "as before"}
    sys.exit(found != expected)
PYTHON
OMP_NUM_THREADS=1 "$python" "$folder/seen.py"
