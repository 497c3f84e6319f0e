"""The student's average: the closed form, when it moves, and that nothing else does."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sharded import networks, spawn, step, whole
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from toy import toy_batch, toy_config, toy_distillation

from senseflow.common.ranks import Ranks, start_ranks
from senseflow.distill.algorithm import train_iteration
from senseflow.distill.measures import Measures
from senseflow.optim.ema import Ema

DECAY, MOVES = 0.75, 7


@pytest.fixture(scope="module")
def alone() -> Ranks:
    """One rank, in this process."""
    return start_ranks()


def average(ranks: Ranks) -> tuple[Ema, dict[str, torch.Tensor]]:
    """After k moves; and d^k theta_0 + sum_i (1 - d) d^(k - i) theta_i in float64."""
    trained = networks(ranks, 0)
    network = trained["generator"].network
    ema = Ema.start(network, DECAY)
    path = [{k: whole(p).double() for k, p in network.named_parameters()}]
    for _ in range(MOVES):
        step(trained)
        ema.update(torch.ones(()))
        path.append({k: whole(p).double() for k, p in network.named_parameters()})
    expected = {k: DECAY**MOVES * v for k, v in path[0].items()}
    for i, theta in enumerate(path[1:], start=1):
        for k, v in theta.items():
            expected[k] = expected[k] + (1 - DECAY) * DECAY ** (MOVES - i) * v
    return ema, expected


def has_the_closed_form(ranks: Ranks, folder: Path) -> None:
    ema, expected = average(ranks)
    assert ema.shards.keys() == expected.keys()
    for key, shard in ema.shards.items():
        assert shard.dtype == torch.float32
        torch.testing.assert_close(whole(shard).double(), expected[key], rtol=1e-5, atol=1e-6)
    gathered = {k: whole(v) for k, v in ema.shards.items()}
    if ranks.is_main:
        torch.save(gathered, folder / "average.pt")


def test_two_ranks_have_the_closed_form_and_the_average_of_one(alone, tmp_path):
    has_the_closed_form(alone, tmp_path)
    spawn(2, tmp_path, has_the_closed_form)
    one, two = (torch.load(f / "average.pt") for f in (tmp_path, tmp_path / "has_the_closed_form"))
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-6, atol=1e-7)


def run(iterations: int, decay: float | None) -> list[dict[str, torch.Tensor]]:
    """Networks and average after each iteration; theta's turn is every second one."""
    d = toy_distillation(toy_config())
    if decay:
        d = replace(d, ema=Ema.start(d.generator.network, decay))
    states = []
    for iteration in range(1, iterations + 1):
        train_iteration(d, [toy_batch()], iteration, Measures())
        parts = {
            "generator": d.generator,
            "fake_score": d.fake_score,
            "heads": d.discriminator.heads,
        }
        state = {f"{n}.{k}": v for n, t in parts.items() for k, v in t.network.state_dict().items()}
        state |= {f"ema.{k}": v for k, v in d.ema.shards.items()} if d.ema else {}
        states.append({k: v.clone() for k, v in state.items()})
    return states


def test_it_moves_on_the_generators_turns_alone_after_its_step():
    first, second, third, fourth = run(4, DECAY)
    start = toy_distillation(toy_config()).generator.network.state_dict()
    for key in [k.removeprefix("ema.") for k in first if k.startswith("ema.")]:
        ema, theta = f"ema.{key}", f"generator.{key}"
        assert torch.equal(first[ema], start[key]) and torch.equal(third[ema], second[ema])
        expected = DECAY * start[key] + (1 - DECAY) * second[theta]
        torch.testing.assert_close(second[ema], expected)
        torch.testing.assert_close(fourth[ema], DECAY * second[ema] + (1 - DECAY) * fourth[theta])
        assert not torch.equal(fourth[ema], third[ema])


def test_training_is_the_same_with_and_without_it():
    for one, other in zip(run(4, None), run(4, DECAY), strict=True):
        assert [k for k in one if not torch.equal(one[k], other[k])] == []


def test_wrapped_blocks_keep_their_names():
    network = torch.nn.Sequential(checkpoint_wrapper(torch.nn.Linear(2, 2)), torch.nn.Linear(2, 1))
    assert list(Ema.start(network, 0.5).shards) == ["0.weight", "0.bias", "1.weight", "1.bias"]
