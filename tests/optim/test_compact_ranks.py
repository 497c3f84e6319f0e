"""Weights and moments in fewer bits on several ranks: the bits of one, also replicated, resumed."""

from pathlib import Path

import pytest
import torch
from compact import KINDS, iterate, pair, round_trip
from sharded import spawn, values

from senseflow.common.ranks import Ranks, start_ranks
from senseflow.engine.checkpoint import Checkpoints
from senseflow.optim.ema import Ema

pytestmark = pytest.mark.long


def every_kind_is_trained_saved_and_resumed(ranks: Ranks, folder: Path) -> None:
    results = [round_trip(ranks, folder / str(i), kind) for i, kind in enumerate(KINDS)]
    if ranks.is_main:
        torch.save(results, folder / "results.pt")


def another_number_of_ranks_goes_on_alike(ranks: Ranks, folder: Path) -> None:
    """From the checkpoints beside its own folder."""
    saved = folder.parent
    for i, kind in enumerate(KINDS):
        trained = pair(ranks, kind)
        ema = Ema.start(trained["generator"].network, 0.9)
        saves = Checkpoints(saved / str(i), 0, ranks)
        found = saves.newest()
        assert found
        saves.load(found[1], trained, ema)
        iterate(trained, ema, 3, 4)
        compare(values(trained, ema), torch.load(saved / "results.pt")[i], kind)


def compare(one: dict, other: dict, kind: tuple[torch.dtype, str]) -> None:
    """The same bits but for clipping: a norm is summed in another order on other ranks, so that a
    value in 2^20 may be rounded to its other neighbour."""
    assert one.keys() == other.keys()
    different = sum(int((one[k] != other[k]).sum()) for k in one if one[k].dtype != torch.float32)
    assert different <= 2, kind
    for key, value in one.items():
        if value.dtype == torch.float32:
            torch.testing.assert_close(value, other[key], rtol=1e-3, atol=1e-4)


def replicas_stay_alike(ranks: Ranks, folder: Path) -> None:
    """HSDP: both hold all rows, and must round them alike."""
    for i, kind in enumerate(KINDS):
        trained = pair(ranks, kind)
        iterate(trained, None, 1, 3)
        local = [p.to_local() for t in trained.values() for p in t.network.parameters()]
        torch.save(local, folder / f"{i}_{ranks.rank}.pt")


def test_two_ranks_and_one_do_the_same(tmp_path):
    here, there = tmp_path / "one", tmp_path / "two"
    here.mkdir()
    there.mkdir()
    alone = start_ranks()
    every_kind_is_trained_saved_and_resumed(alone, here)
    spawn(2, there, every_kind_is_trained_saved_and_resumed)
    there /= "every_kind_is_trained_saved_and_resumed"
    results = [torch.load(folder / "results.pt") for folder in (here, there)]
    for one, two, kind in zip(*results, KINDS, strict=True):
        compare(two, one, kind)
    another_number_of_ranks_goes_on_alike(alone, there / "own")
    spawn(2, here, another_number_of_ranks_goes_on_alike)


def test_replicas_round_alike(tmp_path):
    spawn(2, tmp_path, replicas_stay_alike, replicas=2)
    folder = tmp_path / "replicas_stay_alike"
    for i in range(len(KINDS)):
        one, other = (torch.load(folder / f"{i}_{rank}.pt") for rank in range(2))
        assert all(torch.equal(p, q) for p, q in zip(one, other, strict=True))
