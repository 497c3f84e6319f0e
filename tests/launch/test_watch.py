"""The watch over the other ranks, at a beat of a tenth of a second."""

import threading
import time

import pytest
import torch.distributed as dist

from senseflow.common.signals import STARTED
from senseflow.launch.watch import (
    SILENT_BEATS,
    Failure,
    Watch,
    board_name,
    connect_from_environment,
    post,
    posted,
    report,
)

BEAT_S = 0.1
CAUSE = Failure("the disk is full", final=True, trace="")


class Ranks:
    """Watches on one store that note a cause where they would end the process."""

    def __init__(self) -> None:
        self.store = dist.HashStore()
        self.ended: dict[int, Failure] = {}
        self.watches: list[Watch] = []

    def start(self, rank: int, world_size: int, connect=None) -> Watch:
        def end(failure: Failure) -> None:
            self.ended.setdefault(rank, failure)  # a process ends once

        watch = Watch(rank, world_size, connect or (lambda: self.store), end, BEAT_S)
        self.watches.append(watch)
        return watch

    def wait(self, beats: int) -> None:
        time.sleep(beats * BEAT_S)


@pytest.fixture
def ranks():
    ranks = Ranks()
    yield ranks
    for watch in ranks.watches:
        watch.finished.set()


def test_ranks_that_live_are_left_alone(ranks):
    for rank in range(3):
        ranks.start(rank, 3)
    ranks.wait(3 * SILENT_BEATS)
    assert ranks.ended == {}


def test_a_single_rank_has_no_thread(ranks):
    assert ranks.start(0, 1).threads == []


def test_a_silent_rank_is_named_by_the_one_before_it(ranks):
    ranks.start(0, 3)
    ranks.start(2, 3)
    ranks.store.add("beat/1", 1)
    ranks.store.set("host/1", "gpu17")
    ranks.wait(SILENT_BEATS // 2)
    assert ranks.ended == {}
    ranks.wait(2 * SILENT_BEATS)
    assert "rank 1 on host gpu17 was not heard of" in ranks.ended[0].message
    assert ranks.ended[2] == ranks.ended[0], "the others learn it"


def test_a_rank_that_has_finished_is_not_dead(ranks):
    ranks.start(0, 2)
    other = ranks.start(1, 2)
    ranks.wait(3)
    other.finish()
    ranks.wait(3 * SILENT_BEATS)
    assert ranks.ended == {}


def test_a_posted_failure_ends_every_rank_with_its_cause(ranks):
    for rank in range(2):
        ranks.start(rank, 2)
    assert post(ranks.store, CAUSE)
    ranks.wait(4)
    assert ranks.ended == {0: CAUSE, 1: CAUSE}


def test_the_first_cause_stands_until_a_graver_one_comes():
    store, killed = dist.HashStore(), Failure("rank 1 was killed", gravity=2)
    assert posted(store) is None
    assert post(store, CAUSE) and not post(store, Failure("its consequence"))
    assert posted(store) == CAUSE
    assert post(store, killed) and not post(store, Failure("rank 0 aborted", gravity=1))
    assert not post(store, CAUSE) and posted(store) == killed


def test_a_store_that_never_answers_ends_the_rank(ranks):
    ranks.start(0, 2, connect=threading.Event().wait)
    ranks.wait(2 * SILENT_BEATS)
    assert "launcher of node 0" in ranks.ended[0].message


def test_a_store_that_is_gone_ends_the_rank(ranks):
    def refuse() -> dist.Store:
        raise dist.DistNetworkError("connection refused")

    ranks.start(0, 2, connect=refuse)
    ranks.wait(2)
    assert "launcher of node 0" in ranks.ended[0].message


def test_each_start_of_the_processes_has_keys_of_its_own(monkeypatch):
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    for run_id in ("job.0", "job.1"):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", run_id)
        assert posted(connect_from_environment()) is None
        assert post(connect_from_environment(), CAUSE)
        assert posted(dist.PrefixStore(board_name(run_id), server)) == CAUSE


@pytest.mark.parametrize(
    ("launched", "store_is_there", "told"),
    [(True, True, 0), (True, False, 1), (False, True, 1), (False, False, 1)],
)
def test_a_cause_is_said_where_no_launcher_does(
    monkeypatch, capsys, launched, store_is_there, told
):
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def connect() -> dist.Store:
        if not store_is_there:
            raise dist.DistNetworkError("connection refused")
        return server

    monkeypatch.setattr("senseflow.launch.watch.connect_from_environment", connect)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv(STARTED, "0") if launched else monkeypatch.delenv(STARTED, raising=False)
    report(CAUSE)
    report(Failure("its consequence")) if store_is_there else None
    assert capsys.readouterr().err.count("error: ") == told
