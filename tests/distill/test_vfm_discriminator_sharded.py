"""Heads sharded with FSDP2 on one and two gloo ranks against the same heads in one piece."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from senseflow.distill.vfm_heads import Heads

torch.set_num_threads(1)

WIDTH, TEXT_DIM, NUM_TAPS = 16, 6, 2


def build() -> Heads:
    return Heads(NUM_TAPS, WIDTH, TEXT_DIM, reference=True, seed=4)


def shard(heads: Heads, policy: MixedPrecisionPolicy) -> Heads:
    """One unit per head, and the root for the order of gathering."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for head in heads.heads:
        fully_shard(head, mesh=mesh, mp_policy=policy)
    return fully_shard(heads, mesh=mesh, mp_policy=policy)


def inputs(rank: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """One rank's features of [real, fake], its prompt and its reference."""
    generator = torch.Generator().manual_seed(rank)
    maps = [torch.randn(2, WIDTH, 9, 9, generator=generator) for _ in range(NUM_TAPS)]
    references = [torch.randn(1, WIDTH, 9, 9, generator=generator) for _ in range(NUM_TAPS)]
    text = torch.randn(1, TEXT_DIM, generator=generator)
    return [m.to(dtype) for m in maps], text, [r.to(dtype) for r in references]


def hinge(logits: Tensor) -> Tensor:
    real, fake = logits.chunk(2)
    return (torch.relu(1 - real) + torch.relu(1 + fake)).mean()


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def assert_same_on_all_ranks(tensor: Tensor) -> None:
    copies = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(copies, tensor.contiguous())
    assert all(torch.equal(copies[0], other) for other in copies)


def whole_step(heads: Heads, dtype: torch.dtype) -> list[Tensor]:
    """The heads' own step over all ranks' data in one piece; returns each rank's logits."""
    batches = [inputs(rank, dtype) for rank in range(dist.get_world_size())]
    maps, text, references = zip(*batches, strict=True)
    pairs = [torch.stack(tap, 1).flatten(0, 1) for tap in zip(*maps, strict=True)]
    logits = heads(pairs, torch.cat(text), [torch.cat(r) for r in zip(*references, strict=True)])
    hinge(logits).backward()
    return list(logits.unflatten(0, (2, -1)).unbind(1))


def check_training(rank: int) -> None:
    """Two updates: logits, gradients, weights and buffers equal those in one piece."""
    whole, sharded = build(), shard(build(), MixedPrecisionPolicy())
    optimizers = [torch.optim.AdamW(h.parameters(), lr=1e-2, eps=1e-3) for h in (whole, sharded)]
    for _ in range(2):
        want = whole_step(whole.train(), torch.float32)[rank]
        got = sharded.train()(*inputs(rank, torch.float32))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        hinge(got).backward()
        for ours, theirs in zip(sharded.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(full(ours.grad), theirs.grad, rtol=1e-4, atol=1e-6)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        check_generator_turn(rank, sharded, whole)
    for (name, ours), theirs in zip(sharded.named_buffers(), whole.buffers(), strict=True):
        assert name.endswith(("_u", "_v"))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        assert_same_on_all_ranks(ours)


def check_generator_turn(rank: int, sharded: Heads, whole: Heads) -> None:
    """Frozen heads in eval mode pass the gradient to the features and keep no trace of it."""
    maps, text, references = inputs(rank, torch.float32)
    before = [b.clone() for b in sharded.buffers()]
    grads = []
    for heads in (sharded, whole):
        heads.eval().requires_grad_(False)
        leaves = [m.clone().requires_grad_() for m in maps]
        heads(leaves, text, references).mean().backward()
        grads.append([leaf.grad for leaf in leaves])
        assert all(p.grad is None for p in heads.parameters())
        heads.requires_grad_(True)
    assert all(torch.equal(b, old) for b, old in zip(sharded.buffers(), before, strict=True))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


def check_bfloat16(rank: int) -> None:
    """bfloat16 gathering and compute: the power iteration still runs in float32."""
    rounded = build()
    with torch.no_grad():
        for parameter in rounded.parameters():
            parameter.copy_(parameter.bfloat16())
    reference = copy.deepcopy(rounded)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    sharded = shard(build(), policy)
    want = whole_step(rounded.train(), torch.bfloat16)[rank]
    got = sharded.train()(*inputs(rank, torch.bfloat16))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.01)
    hinge(got).backward()
    assert all(full(p.grad).dtype == torch.float32 for p in sharded.parameters())

    # the buffers are those of a float32 iteration on the rounded weights, to float32's digits
    reference.train()(*inputs(rank, torch.float32))
    for ours, theirs in zip(sharded.buffers(), reference.buffers(), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        assert_same_on_all_ranks(ours)


def worker(
    rank: int, world_size: int, store: str, checks: tuple[Callable[[int], None], ...]
) -> None:
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    try:
        for check in checks:
            check(rank)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [1, 2])
def test_sharded_heads_equal_whole_ones(world_size: int, tmp_path: Path) -> None:
    store = f"file://{tmp_path}/store"
    mp.spawn(worker, (world_size, store, (check_training, check_bfloat16)), nprocs=world_size)
