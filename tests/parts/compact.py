"""Sharded networks in every type of masters and moments, for tests on one and several ranks."""

from dataclasses import replace
from pathlib import Path

import torch
from sharded import assert_same, values
from torch import nn
from torch.distributed.tensor import DTensor

from senseflow.common.ranks import Ranks
from senseflow.config.sections import OptimizerConfig
from senseflow.engine.checkpoint import Checkpoints
from senseflow.engine.parallel import keep_parameters_in, shard
from senseflow.optim.ema import Ema
from senseflow.optim.trained import Trained, align_networks

KINDS = [
    (masters, states)
    for masters in (torch.float32, torch.bfloat16)
    for states in ("float32", "bfloat16", "8bit")
]
OPTIMIZER = OptimizerConfig(lr=0.01, fake_score_lr=0.01, discriminator_lr=0.01, weight_decay=0.1)


def network(seed: int, masters: torch.dtype) -> nn.Module:
    """Rows of whole blocks of 64 and others, 5 rows that no two ranks share evenly, a buffer."""
    torch.manual_seed(seed)
    layers = nn.Sequential(
        nn.Linear(64, 5), nn.Linear(5, 3), nn.Conv2d(64, 2, 2), nn.BatchNorm1d(5)
    )
    keep_parameters_in(layers, masters)
    return layers


def pair(
    ranks: Ranks, kind: tuple[torch.dtype, str], offload: bool = False, compiled: bool = False
) -> dict[str, Trained]:
    """Generator and fake score, sharded, at their start."""
    masters, states = kind
    trained = {}
    for seed, name in enumerate(("generator", "fake_score")):
        layers = network(seed, masters)
        shard(layers, [layers[0]], ranks.mesh, offload=offload)
        trained[name] = Trained.build(layers, 0.01, replace(OPTIMIZER, states=states), compiled)
    return trained


def give_gradients(trained: Trained, iteration: int, bad: float | None = None) -> None:
    """Gradients that are a function of the iteration alone, sharded as the parameters."""
    generator = torch.Generator().manual_seed(iteration)
    for parameter in trained.network.parameters():
        whole = torch.randn(parameter.shape, generator=generator) / 100  # together below 1
        if bad is not None:
            whole.view(-1)[0] = bad
        whole = whole.to(parameter.dtype)
        if isinstance(parameter, DTensor):
            rows = _rows(parameter)
            local = whole[rows : rows + len(parameter.to_local())]
            whole = DTensor.from_local(
                local,
                parameter.device_mesh,
                parameter.placements,
                run_check=False,
                shape=parameter.shape,
                stride=parameter.stride(),
            )
        parameter.grad = whole


def _rows(parameter: DTensor) -> int:
    """Where this rank's rows begin: torch splits as `chunk` does, the last ones get less."""
    mesh = parameter.device_mesh
    size, rank = mesh.size(mesh.ndim - 1), mesh.get_local_rank(mesh.ndim - 1)
    return min(rank * -(-len(parameter) // size), len(parameter))


def iterate(trained: dict[str, Trained], ema: Ema | None, first: int, last: int) -> None:
    """Iterations first..last: both networks step, then IDA, then the average."""
    for iteration in range(first, last + 1):
        for seed, part in enumerate(trained.values()):
            give_gradients(part, iteration)
            part.step(1000 * iteration + seed)
        generator, fake_score = (trained[n].network for n in ("generator", "fake_score"))
        taken = torch.ones(())
        align_networks(fake_score, generator, 0.97, taken, 1000 * iteration + 7)
        if ema:
            ema.update(taken)


def round_trip(ranks: Ranks, folder: Path, kind: tuple[torch.dtype, str]) -> dict:
    """Four iterations at once, and two with two more from a checkpoint: the same bits."""
    straight = pair(ranks, kind)
    average = Ema.start(straight["generator"].network, 0.9)
    iterate(straight, average, 1, 4)
    broken = pair(ranks, kind)
    other = Ema.start(broken["generator"].network, 0.9)
    iterate(broken, other, 1, 2)
    with Checkpoints(folder, 0, ranks, asynchronous=True) as saves:
        file = saves.save(2, broken, other)
    again = pair(ranks, kind)
    other = Ema.start(again["generator"].network, 0.9)
    with torch.no_grad():
        for part in again.values():
            for parameter in part.network.parameters():
                parameter.zero_()
    Checkpoints(folder, 0, ranks).load(file, again, other)
    iterate(again, other, 3, 4)
    result = values(straight, average)
    assert_same(values(again, other), result)
    return result
