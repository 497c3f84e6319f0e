"""Networks that stay gathered are what they are resharded: nobody reads or moves stale weights.

One rank: there too what is gathered is a copy of the shards.
"""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from compact import OPTIMIZER
from ranks import on_ranks
from sharded import whole
from short_runs import begin, configure, finish, write_pictures
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from training_runs import full_state as saved
from training_runs import timeless_rows

from senseflow.common.ranks import start_ranks
from senseflow.distill.state import frozen
from senseflow.engine.checkpoint import full_state
from senseflow.engine.loop import Run
from senseflow.engine.parallel import shard
from senseflow.optim.ema import Ema
from senseflow.optim.resharding import reshard
from senseflow.optim.trained import Trained, align_networks
from senseflow.weights.filling import fill_shards
from senseflow.weights.lora import ADAPTERS, Role, share
from senseflow.weights.lora_settings import LoraSettings
from senseflow.weights.meta import NetworkSource

X = torch.linspace(-1, 1, 24).view(3, 8).to(torch.bfloat16)
Roles = Callable[[bool], tuple[nn.Module, nn.Module, nn.Module]]


def source() -> NetworkSource:
    """Three units: two layers and the rest."""
    torch.manual_seed(0)
    layers = [nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 8), nn.Linear(8, 8)]
    weights = nn.Sequential(*layers).state_dict()
    with torch.device("meta"):
        network = nn.Sequential(nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 8), nn.Linear(8, 8))
    return NetworkSource(network, weights.__getitem__, [network[0], network[2]])


def build(source: NetworkSource, reshards: bool) -> nn.Module:
    blocks, mesh = source.blocks, start_ranks().mesh
    shard(source.network, blocks, mesh, torch.bfloat16, reshard_after_forward=reshards)
    fill_shards(source.network, source.read, start_ranks().device)
    return source.network


def three_networks(reshards: bool) -> tuple[nn.Module, nn.Module, nn.Module]:
    teacher = source()
    teacher.network.requires_grad_(False)
    return build(teacher, reshards), build(source(), reshards), build(source(), reshards)


def three_roles(reshards: bool) -> tuple[nn.Module, nn.Module, nn.Module]:
    shared, base = share(source(), LoraSettings(2, 4, "AB", ("0", "2", "3"), seed=0))
    build(shared, reshards)
    generator, fake_score = (Role(base, name) for name in ADAPTERS)
    return Role(base, None), generator, fake_score


def units(network: nn.Module) -> list[FSDPModule]:
    of = network.base.network if isinstance(network, Role) else network
    return [module for module in of.modules() if isinstance(module, FSDPModule)]


def are_gathered(network: nn.Module) -> list[bool]:
    return [unit._get_fsdp_state()._fsdp_param_group.is_unsharded for unit in units(network)]


def history(roles: Roles, reshards: bool) -> list[Tensor]:
    """Everything that three iterations compute, and what is saved after each."""
    teacher, *learn = roles(reshards)
    generator, fake = (Trained.build(n, 0.1, OPTIMIZER) for n in learn)
    ema = Ema.start(generator.network, 0.5)
    run = SimpleNamespace(
        parts=SimpleNamespace(generator=generator, fake_score=fake), ranks=start_ranks()
    )
    found: list[Tensor] = []

    def read(network: nn.Module) -> Tensor:
        with torch.no_grad():
            found.append(network(X))
        return found[-1]

    for step in range(3):
        read(generator.network)
        x = generator.network(X)
        (x * (read(fake.network) - read(teacher) - 1)).sum().backward()
        taken = torch.isfinite(generator.step(step)).float()
        ema.update(taken)
        align_networks(fake.network, generator.network, 0.5, taken, step)
        (fake.network(X) - x.detach() + 1).square().sum().backward()
        fake.step(step)
        read(fake.network), read(generator.network)
        found.append(torch.tensor(Run.gap(run) or 0.0))
        read(fake.network), read(generator.network)
        state = full_state({"generator": generator, "fake_score": fake}, ema)
        for name in ("generator", "fake_score"):
            found += [whole(tensor) for tensor in state[name]["network"].values()]
            for values in state[name]["optimizer"]["state"].values():
                found += [whole(tensor) for tensor in values.values()]
        found += [whole(tensor) for tensor in state["ema"].values()]
    return found


@pytest.mark.parametrize("roles", [three_networks, three_roles])
def test_what_stays_gathered_computes_and_saves_the_same(roles):
    once, kept = history(roles, True), history(roles, False)
    assert len(once) == len(kept) > 100
    assert all(torch.equal(a, b) for a, b in zip(once, kept, strict=True))
    outputs = [tensor for tensor in once if tensor.shape == X.shape]
    assert len({tuple(tensor.flatten().tolist()) for tensor in outputs}) > 6  # they move


def test_it_is_gathered_until_its_weights_change():
    teacher, *learn = three_networks(False)
    generator, fake = (Trained.build(n, 0.1, OPTIMIZER) for n in learn)
    with torch.no_grad():
        teacher(X), fake.network(X)
    generator.network(X).sum().backward()
    assert all(are_gathered(teacher) + are_gathered(generator.network))
    taken = torch.isfinite(generator.step()).float()
    assert not any(are_gathered(generator.network)) and all(are_gathered(fake.network))
    align_networks(fake.network, generator.network, 0.5, taken, 0)
    assert not any(are_gathered(fake.network)) and all(are_gathered(teacher))


@pytest.mark.parametrize("gathered", [False, True])
def test_frozen_for_a_loss_it_learns_again_afterwards(gathered):
    """Whatever was gathered before: DMD2's classifier runs the fake score so."""
    _, network, _ = three_networks(False)
    if gathered:
        with torch.no_grad():
            network(X)
    x = X.clone().requires_grad_()
    with frozen(network):
        (gradient,) = torch.autograd.grad(network(x).sum(), x)
        assert not any(p.requires_grad for p in network.parameters())
    assert gradient.abs().max() > 0
    network(X).sum().backward()
    reshard(network)
    assert all(p.requires_grad and p.grad is not None for p in network.parameters())


# ------------------------------------------------------------------------------------ whole runs

ITERATIONS = (
    "train.iter_num=6",
    "train.save_interval=3",
    "train.log_interval=1",  # measures the gap of IDA
    "train.seed=730",  # data and simulation, the top anchor and others
    "fake_score.ttur=2",
    "log.sample_interval=2",
)
RUNS = {
    "full": ("flux_senseflow", ("ida.lam=0.9", "ema.decay=0.5")),
    "lora": ("flux_senseflow", ("ida.lam=0.9", "lora.rank=4", "lora.alpha=8", "lora.base=nf4")),
    "dmd2": ("sdxl_dmd2", ()),
    "dmd2, lora": ("sdxl_dmd2", ("lora.rank=4", "lora.alpha=8")),
}


def train_both(rank: int, data: Path, folder: Path) -> None:
    """Every run of the table, its networks resharded after each pass and not."""
    for name, (recipe, more) in RUNS.items():
        for reshards in ("true", "false"):
            kept = f"parallel.reshard_after_forward={reshards}"
            config = configure(data, *ITERATIONS, *more, kept, recipe=recipe)
            finish(begin(config, folder / name / reshards))


@pytest.mark.long
def test_whole_runs_on_two_ranks_are_the_same_to_the_bit(tmp_path):
    """Six iterations, three of the student: rows, every tensor saved, the students."""
    on_ranks(2, train_both, write_pictures(tmp_path / "data"), tmp_path)
    for name in RUNS:
        one, other = (tmp_path / name / reshards for reshards in ("true", "false"))
        assert timeless_rows(one) == timeless_rows(other)
        for iteration in (3, 6):
            a, b = (saved(folder, iteration, tmp_path) for folder in (one, other))
            assert a.keys() == b.keys() and len(a) > 100
            assert [key for key in a if not torch.equal(a[key], b[key])] == []
        (file,) = (one / "student/step_0000006").glob("*.safetensors")
        assert file.read_bytes() == (other / "student/step_0000006" / file.name).read_bytes()
