"""What ranks tell each other: in time, alike, and an error where they would part."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from ranks import on_ranks

from senseflow.common.ranks import start_ranks
from senseflow.core.anchors import Anchors
from senseflow.distill.state import Turn
from senseflow.engine.agreement import Agreement, DisagreementError, require_equal

ANCHORS = Anchors((1000, 750, 500, 250))


def turn(iteration: int) -> Turn:
    return Turn(iteration, ANCHORS, iteration % 4, simulate=True, generator=False, adversarial=True)


def check_parts(rank: int) -> None:
    """What differs is named on every rank."""
    require_equal({"one": 1, "two": {"a": (1, 2.5)}})
    with pytest.raises(DisagreementError, match=r"^ranks disagree: two \(rank 0 unlike 1, 2\)\."):
        require_equal({"one": 1, "two": min(rank, 1)})


def check_news(rank: int) -> None:
    """A stop asked on rank 1 in iteration 3, and a file found by each in iteration 1."""
    stop = SimpleNamespace(reason=None)
    agreement = Agreement(start_ranks(), stop)
    heard = []
    for iteration in range(1, 6):
        if rank == 1 and iteration == 3:
            stop.reason = "SIGTERM"
        heard.append(agreement.reach(1 + rank, turn(iteration + agreement.AHEAD)))
    dist.barrier()
    assert heard == [(False, 0), (False, 6), (False, 6), (True, 6), (True, 6)]


def check_turns(rank: int) -> None:
    """Rank 2 will draw another anchor in iteration 6: all learn it before they begin it."""
    agreement = Agreement(start_ranks(), SimpleNamespace(reason=None))
    begun = 0
    with pytest.raises(DisagreementError, match=r"turn of iteration 6 \(rank 0 unlike 2\)"):
        for iteration in range(1, 10):
            begun = iteration
            ahead = turn(iteration + agreement.AHEAD)
            odd = rank == 2 and ahead.iteration == 6
            agreement.reach(0, replace(ahead, anchor=ahead.anchor + 1) if odd else ahead)
    assert begun == 5


def check_all(rank: int) -> None:
    check_parts(rank)
    check_news(rank)
    check_turns(rank)


def test_three_ranks_name_what_differs_hear_news_and_part_never():
    on_ranks(3, check_all)


def test_one_rank_hears_itself_at_once():
    stop = SimpleNamespace(reason=None)
    agreement = Agreement(start_ranks(), stop)
    assert agreement.reach(2, turn(3)) == (False, 2)
    stop.reason = "time limit"
    assert agreement.reach(2, turn(4)) == (True, 2)
