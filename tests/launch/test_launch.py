"""The launcher: its arguments, where nodes meet, what is started again, and who is blamed."""

import argparse
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch.distributed as dist

from senseflow.launch import launch
from senseflow.launch.entry import check_arguments, read_arguments
from senseflow.launch.launch import Worker, agree_on_cause, train, violent_death
from senseflow.launch.meeting import (
    Meeting,
    NodeGoneError,
    Place,
    address_towards,
    bounded,
    interface_of,
    place_from,
)
from senseflow.launch.watch import Failure, post, posted
from senseflow.trainer.trainer_flux_senseflow import RECIPE

SET = {"NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
GOING_ON = SimpleNamespace(reason=None)


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """What the launcher sets for its processes is not to last."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")


def no_worker() -> None:
    """One is never started here."""
    raise AssertionError


def arguments(monkeypatch, line: str) -> argparse.Namespace:
    monkeypatch.setattr(sys, "argv", ["script", *line.split()])
    return read_arguments(RECIPE)


@pytest.mark.parametrize(
    "line",
    [
        "--max-restarts 3 2 8 c.yaml runs/x a.b=1 c.d=-2",
        "2 8 --max-restarts=3 c.yaml runs/x a.b=1 c.d=-2",
        "2 8 c.yaml runs/x a.b=1 --max-restarts 3 c.d=-2",
        "2 8 c.yaml runs/x a.b=1 c.d=-2 --max-restarts 3",
    ],
)
def test_max_restarts_may_stand_anywhere(monkeypatch, line):
    args = arguments(monkeypatch, line)
    assert (args.nodes, args.gpus) == (2, 8)
    assert (args.config, args.save_dir) == (Path("c.yaml"), Path("runs/x"))
    assert (args.overrides, args.max_restarts) == (["a.b=1", "c.d=-2"], 3)


def test_where_nodes_meet():
    assert place_from({}, 1) == Place("127.0.0.1", 0, 0)
    assert place_from(SET, 2) == Place("10.0.0.1", 29500, 1)
    torchrun = {"PET_RDZV_ENDPOINT": "gpu1:29400", "PET_RDZV_ID": "7", "PET_RDZV_BACKEND": "c10d"}
    assert place_from(torchrun, 2) == Place("gpu1", 29400, None, "7")
    assert place_from({"PET_RDZV_ENDPOINT": "127.0.0.1:29400"}, 2).keeps_store
    assert not place_from({"PET_RDZV_ENDPOINT": "192.0.2.1:29400"}, 2).keeps_store


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"NODE_RANK": ""}, "2 nodes need NODE_RANK in the environment"),
        ({"NODE_RANK": "", "MASTER_PORT": ""}, "need NODE_RANK, MASTER_PORT in"),
        ({"NODE_RANK": "gpu1"}, "NODE_RANK 'gpu1' is not a whole number"),
        ({"NODE_RANK": "-1"}, "NODE_RANK -1 must be from 0 to"),
        ({"NODE_RANK": "2"}, "NODE_RANK 2 is not below NODES 2"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT 'http' is not a whole number"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT 70000 must be from 1 to 65535"),
        ({"MASTER_PORT": "9" * 5000}, "MASTER_PORT '9999"),
        ({"PET_RDZV_ENDPOINT": "gpu1:http"}, "port number of the rendezvous endpoint"),
        ({"PET_RDZV_ENDPOINT": "a:1", "PET_RDZV_BACKEND": "etcd"}, "PET_RDZV_BACKEND 'etcd'"),
    ],
)
def test_what_is_wrong_with_the_environment_is_one_line(changed, message):
    with pytest.raises(ValueError, match=message) as error:
        place_from({**SET, **changed}, 2)
    assert "\n" not in str(error.value)


def test_the_interface_is_the_one_with_the_address():
    assert address_towards("127.0.0.1") == "127.0.0.1"
    name = interface_of("127.0.0.1")
    assert name and "127.0.0.1" in [a.address for a in psutil.net_if_addrs()[name]]
    assert interface_of("192.0.2.1") is None  # an address nobody has (RFC 5737)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def two() -> tuple[Meeting, Meeting]:
    """The launchers of two nodes, in one process."""
    port = free_port()
    places = [Place("127.0.0.1", port, rank) for rank in range(2)]
    return tuple(Meeting(place, 2, lambda: False) for place in places)  # type: ignore


def test_launchers_wait_for_each_other(two):
    assert not two[0].gather("alone", 0.5)
    results: list[bool] = []
    waiting = threading.Thread(target=lambda: results.append(two[0].gather("both", 20)))
    waiting.start()
    time.sleep(0.5)
    assert results == []
    assert two[1].gather("both", 20)
    waiting.join()
    assert results == [True]


def test_a_node_rank_given_twice_is_an_error(two, monkeypatch):
    monkeypatch.setattr("os.getpid", lambda: 1)  # another launcher
    with pytest.raises(ValueError, match=r"NODE_RANK 1 is taken by .* each node needs its own"):
        Meeting(Place("127.0.0.1", two[0].port, 1), 2, lambda: False)


def test_an_address_of_another_host_is_an_error_on_node_0():
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        with pytest.raises(ValueError, match="is MASTER_ADDR the address of this host"):
            Meeting(Place("127.0.0.1", taken.getsockname()[1], 0), 2, lambda: False)


def test_a_host_nobody_knows_is_an_error():
    with pytest.raises(ValueError, match=r"no host is known here as 'nowhere\.invalid'"):
        Meeting(Place("nowhere.invalid", 29500, 1), 2, lambda: False)


def test_waiting_for_node_0_ends_on_a_stop_request():
    with pytest.raises(NodeGoneError):
        Meeting(Place("127.0.0.1", free_port(), 1), 2, lambda: True)


def test_an_answer_is_not_waited_for_longer_than_said():
    assert bounded(lambda: 3, 5) == 3
    with pytest.raises(ZeroDivisionError):
        bounded(lambda: 1 // 0, 5)
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        bounded(threading.Event().wait, 0.2)
    assert time.monotonic() - began < 5


def failed(exitcode: int, timestamp: int = 100, pid: int = 7) -> SimpleNamespace:
    """As torchrun's ProcessFailure."""
    return SimpleNamespace(exitcode=exitcode, timestamp=timestamp, pid=pid)


def test_who_was_killed_is_told_from_who_failed_because_of_it():
    assert violent_death({0: failed(1), 1: failed(1)}) is None
    killed = violent_death({0: failed(1), 1: failed(-signal.SIGKILL)})
    assert killed and "rank 1 (pid 7, host" in killed.message
    assert "killed by SIGKILL (often: out of memory)" in killed.message
    segment = violent_death({3: failed(-signal.SIGSEGV)})
    assert segment and "SIGSEGV" in segment.message and "memory" not in segment.message
    coded = violent_death({3: failed(42)})
    assert coded and "ended with exit code 42" in coded.message
    aborted = {0: failed(-signal.SIGABRT), 1: failed(-signal.SIGKILL)}  # the same second
    assert "rank 1" in violent_death(aborted).message
    assert violent_death({0: failed(-signal.SIGABRT)}).gravity < killed.gravity
    late = {0: failed(1, 100), 1: failed(-signal.SIGKILL, 130)}  # by torchrun, in clearing up
    assert violent_death(late) is None


class Agent:
    """In torchrun's place: what each start comes to, and the flags it was given."""

    def __init__(self, meeting: Meeting, *outcomes: dict[int, SimpleNamespace] | Failure) -> None:
        self.meeting, self.outcomes, self.flags = meeting, list(outcomes), []

    def __call__(self, flags: list[str], worker: Worker) -> dict[int, SimpleNamespace]:
        self.flags.append(flags)
        outcome = self.outcomes.pop(0)
        if not isinstance(outcome, Failure):
            return outcome
        run_id = next(f for f in flags if f.startswith("--rdzv-id=")).partition("=")[2]
        post(self.meeting.board(run_id), outcome)
        return {0: failed(1)}


KILL = {0: failed(-signal.SIGKILL)}


@pytest.mark.parametrize(
    ("outcomes", "max_restarts", "code", "starts"),
    [
        ([{}], 2, 0, 1),
        ([KILL, {}], 0, 1, 1),
        ([KILL, {}], 1, 0, 2),
        ([KILL, KILL, {}], 1, 1, 2),
        ([Failure("disk is full"), {}], 1, 0, 2),
        ([Failure("losses are not finite", final=True), {}], 5, 1, 1),
    ],
)
def test_what_need_not_repeat_is_started_again(
    monkeypatch, capsys, outcomes, max_restarts, code, starts
):
    meeting = Meeting(Place("127.0.0.1", 0, 0), 1, lambda: False)
    agent = Agent(meeting, *outcomes)
    monkeypatch.setattr(launch, "run_agent", agent)
    assert train(meeting, 4, no_worker, max_restarts, GOING_ON) == code
    assert len(agent.flags) == starts == len({tuple(flags) for flags in agent.flags})
    assert capsys.readouterr().err.count("error: ") == starts - (code == 0)


def test_a_stop_request_is_not_followed_by_a_start(monkeypatch):
    meeting = Meeting(Place("127.0.0.1", 0, 0), 1, lambda: False)
    agent = Agent(meeting, KILL, {})
    monkeypatch.setattr(launch, "run_agent", agent)
    assert train(meeting, 4, no_worker, 3, SimpleNamespace(reason="SIGTERM")) == 0
    assert agent.flags == []


def test_launchers_name_the_same_cause(two, monkeypatch, capsys):
    """Node 1's rank was killed; node 0's posted only that the connection was closed."""
    outcomes = [Failure("Connection closed by peer"), {1: failed(-signal.SIGKILL, pid=77)}]
    agents = [Agent(meeting, outcome) for meeting, outcome in zip(two, outcomes, strict=True)]
    by_rank = {f"--node-rank={meeting.rank}": a for meeting, a in zip(two, agents, strict=True)}

    def run_agent(flags: list[str], worker: Worker) -> dict[int, SimpleNamespace]:
        return next(agent for flag, agent in by_rank.items() if flag in flags)(flags, worker)

    monkeypatch.setattr(launch, "run_agent", run_agent)
    codes: list[int] = []

    def go(meeting: Meeting) -> None:
        codes.append(train(meeting, 1, no_worker, 0, GOING_ON))

    threads = [threading.Thread(target=go, args=(meeting,)) for meeting in two]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    said = capsys.readouterr().err
    assert codes == [1, 1] and said.count("rank 1 (pid 77, host") == 2
    assert posted(two[0].board(".0")).message.startswith("rank 1 (pid 77")


def test_an_end_nobody_explained_reaches_the_ranks_of_other_nodes_until_someone_does(two):
    """An ImportError ends a process with exit code 1 before it can post anything."""
    board, silent = two[0].board(".0"), {1: failed(1)}
    cause, all_met = agree_on_cause(two[1], ".0", silent, patience_s=0)
    assert not all_met and posted(board) == cause
    assert "ended without a cause" in cause.message
    post(board, Failure("rank 0 says why"))
    assert posted(board).message == "rank 0 says why"


def test_node_0_waits_for_a_node_that_comes_late(monkeypatch):
    monkeypatch.setattr("senseflow.launch.meeting.ANSWER_S", 0.3)
    monkeypatch.setattr(launch, "run_agent", lambda flags, worker: {})
    port, codes = free_port(), []

    def node(rank: int) -> None:
        meeting = Meeting(Place("127.0.0.1", port, rank), 2, lambda: False)
        codes.append(train(meeting, 1, no_worker, 0, GOING_ON))

    threads = [threading.Thread(target=node, args=(rank,)) for rank in range(2)]
    threads[0].start()
    time.sleep(1.5)
    assert codes == []
    threads[1].start()
    for thread in threads:
        thread.join(20)
    assert codes == [0, 0]


def test_torchrun_is_told_to_meet_at_the_store_that_is_kept(two):
    flags = two[1].flags("job.3")
    assert f"--rdzv-endpoint=127.0.0.1:{two[0].port}" in flags
    assert {"--nnodes=2", "--node-rank=1", "--rdzv-id=job.3"} <= set(flags)
    store = two[1].store
    assert isinstance(store, dist.PrefixStore)


@pytest.mark.parametrize(
    "line", ["c.yaml runs/x", "c.yaml runs/x train.seed=1 a.b=2", "1 c.yaml r x"]
)
def test_forgotten_nodes_and_gpus_are_said_in_one_line(monkeypatch, capsys, line):
    with pytest.raises(SystemExit):
        arguments(monkeypatch, line)
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert (
        "'c.yaml' is not a whole number: NODES and GPUS" in said
        and f"sh {RECIPE.script} 1 8" in said
    )


def test_a_save_dir_below_a_file_is_said_without_torch(monkeypatch, tmp_path):
    (tmp_path / "notes").write_text("")
    args = arguments(monkeypatch, f"1 1 {RECIPE.config} {tmp_path}/notes/run")
    with pytest.raises(ValueError, match=r"SAVE_DIR .*notes/run is under .*notes, which is a file"):
        check_arguments(args, RECIPE)
    args.save_dir = Path("x" * 300)
    with pytest.raises(ValueError, match=r"^SAVE_DIR x{100}: File name too long$"):
        check_arguments(args, RECIPE)
