"""Networks of a few parameters on several gloo ranks, for tests of what is saved of them."""

import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils.parametrizations import spectral_norm

from senseflow.common.ranks import Ranks, start_ranks
from senseflow.config.sections import OptimizerConfig
from senseflow.engine.parallel import shard
from senseflow.optim.ema import Ema
from senseflow.optim.trained import Trained

Check = Callable[[Ranks, Path], None]
OPTIMIZER = OptimizerConfig(lr=0.1, fake_score_lr=0.1, discriminator_lr=0.1)


def networks(ranks: Ranks, seed: int, width: int = 5) -> dict[str, Trained]:
    """Two sharded networks with buffers, one step into their training; rows split unevenly."""
    torch.manual_seed(seed)
    trained = {}
    for name in ("generator", "discriminator"):
        network = nn.Sequential(spectral_norm(nn.Linear(3, width)), nn.Linear(width, 1))
        shard(network, [network[0]], ranks.mesh)
        trained[name] = Trained.build(network, 0.1, OPTIMIZER)
    step(trained)
    return trained


def step(trained: dict[str, Trained], num: int = 1) -> None:
    """Training steps, the same on all ranks."""
    x = torch.linspace(-1, 1, 15).view(5, 3)
    for _ in range(num):
        for part in trained.values():
            part.network(x).square().sum().backward()
            part.step()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def values(trained: dict[str, Trained], ema: Ema | None = None) -> dict[str, torch.Tensor]:
    """Every tensor of networks, optimizers and the average, unsharded."""
    result = {f"ema.{k}": v for k, v in ema.shards.items()} if ema else {}
    for name, part in trained.items():
        result |= {f"{name}.{k}": v for k, v in part.network.state_dict().items()}
        for i, state in part.optimizer.state_dict()["state"].items():
            result |= {f"{name}.{i}.{k}": v for k, v in state.items()}
    return {k: whole(v) for k, v in result.items()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [k for k in one if not torch.equal(one[k], other[k])] == []


def spawn(num: int, folder: Path, *checks: Check, replicas: int = 1) -> None:
    """Run `checks` on `num` ranks, each in a folder of its own; a failure on one is the test's."""
    mp.spawn(_rank, (num, folder, checks, replicas), nprocs=num)


def _rank(rank: int, num: int, folder: Path, checks: tuple[Check, ...], replicas: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(num))
    store = dist.FileStore(str(folder / f"store_{checks[0].__name__}"), num)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num)
    ranks = start_ranks(replicas)
    try:
        for check in checks:
            own = folder / check.__name__
            own.mkdir(exist_ok=True)
            check(ranks, own)
    finally:
        dist.destroy_process_group()
