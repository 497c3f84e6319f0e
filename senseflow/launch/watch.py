"""A process whose peers are gone ends within a minute, and every node learns the cause.

Each rank beats every BEAT_S seconds in torch's own store, through a connection of its own, and
watches the beat of the next rank (a ring: load does not grow with the number of ranks). A rank that
fails posts the cause there; every other one reads it at its next beat. No collective and no device
is involved, so it works while one of them is stuck for good: NCCL raises nothing when its peer is
gone, and a pulled cable resets no connection.

A beat means that the process lives, not that it gets on: a long checkpoint, a slow disk or pdb do
not stop it. What does: a process that is stopped whole (SIGSTOP, gdb) or holds the interpreter's
lock for SILENT_BEATS beats. Beats are counted, not seconds, so that a job suspended as a whole is
not taken for dead when it wakes.
"""

import json
import os
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch.distributed as dist

from senseflow.common.signals import STARTED

BEAT_S = 5.0
SILENT_BEATS = 8  # without one of these a rank is dead
FIRST_BEATS = 120  # importing the libraries from a busy shared disk takes minutes


@dataclass(frozen=True)
class Failure:
    """Why a run failed."""

    message: str  # one line
    final: bool = False  # it would only repeat: no restart
    trace: str = ""  # of an error nobody expected
    gravity: int = 0  # -1: none is known; 0: an error; 1: the process aborted; 2: it was killed


def board_name(run_id: str, restarts: str = "0") -> str:
    """Sets the keys of one start of the processes apart: torchrun keeps its store over restarts."""
    return f"senseflow/{run_id}/{restarts}"


def connect_from_environment() -> dist.Store:
    """A connection of one's own to the store torchrun's processes share; raises dist.DistError."""
    env = os.environ
    # Not a shared one: behind an operation that waits, no beat would get through.
    store = dist.TCPStore(
        env["MASTER_ADDR"],
        int(env["MASTER_PORT"]),
        timeout=timedelta(seconds=30),
        wait_for_workers=False,
    )
    restarts = env.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(board_name(env.get("TORCHELASTIC_RUN_ID", ""), restarts), store)


def post(store: dist.Store, failure: Failure) -> bool:
    """Leave the cause for all nodes; returns whether it stands.

    The first one stands, because the end of a process gives errors to the others; a graver one
    replaces it, because a process that is killed posts nothing itself.
    """
    text = json.dumps(asdict(failure)).encode()
    there = store.compare_set("failure", "", text.decode())
    while there != text and Failure(**json.loads(there)).gravity < failure.gravity:
        there = store.compare_set("failure", there.decode(), text.decode())
    return bool(there == text)


def posted(store: dist.Store) -> Failure | None:
    """The cause, if any rank has failed."""
    return Failure(**json.loads(store.get("failure"))) if store.check(["failure"]) else None


class Watch:
    """Two daemon threads of one rank; none with a single rank.

    One beats, reads and compares. An operation on the store never returns when the network is gone,
    so the other only sees that the first gets on.

    end: what to do with the cause; the default ends the process.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        connect: Callable[[], dist.Store] = connect_from_environment,
        end: Callable[[Failure], None] | None = None,
        beat_s: float = BEAT_S,
    ) -> None:
        self.rank, self.next = rank, (rank + 1) % world_size
        self.connect, self.end, self.beat_s = connect, end or end_process, beat_s
        self.finished = threading.Event()
        self.beats = 0
        targets = (self._beat, self._guard) if world_size > 1 else ()
        self.threads = [threading.Thread(target=t, name=t.__name__, daemon=True) for t in targets]
        for thread in self.threads:
            thread.start()

    def finish(self) -> None:
        """The end of this rank is no death: says so, and ends the threads."""
        self.finished.set()
        for thread in self.threads:
            thread.join(self.beat_s)

    def _beat(self) -> None:
        try:
            store = self.connect()
            store.set(f"host/{self.rank}", socket.gethostname())
            heard, still = 0, 0
            while not self.finished.wait(self.beat_s):
                self.beats = store.add(f"beat/{self.rank}", 1)
                failure = posted(store)
                before, heard = heard, store.add(f"beat/{self.next}", 0)
                still = still + 1 if heard == before else 0
                if failure is None and still >= (SILENT_BEATS if heard else FIRST_BEATS):
                    failure = self._silence(store, still)
                if failure:
                    self.end(failure)
                    return
            store.set(f"done/{self.rank}", "")
        except dist.DistError:
            if not self.finished.is_set():
                self.end(self._lost())

    def _silence(self, store: dist.Store, still: int) -> Failure | None:
        """The next rank is silent: the cause, unless it has finished."""
        if store.check([f"done/{self.next}"]):
            return None
        key = f"host/{self.next}"
        where = f" on host {store.get(key).decode()}" if store.check([key]) else ""
        failure = Failure(
            f"rank {self.next}{where} was not heard of for {still * self.beat_s:.0f} s: its host "
            "or the network to it is gone"
        )
        post(store, failure)
        return failure

    def _guard(self) -> None:
        seen, still = 0, 0
        while not self.finished.wait(self.beat_s):
            before, seen = seen, self.beats
            still = still + 1 if seen == before else 0
            if still >= SILENT_BEATS:
                self.end(self._lost())
                return

    def _lost(self) -> Failure:
        where = os.environ.get("MASTER_ADDR", "?")
        return Failure(f"the launcher of node 0, on {where}, or the network to it is gone")


def end_process(failure: Failure) -> None:
    """End at once and quietly (a collective may be stuck for good): the launcher says why."""
    if STARTED not in os.environ:  # torchrun without our launcher
        say(failure)
    os._exit(1)


def say(failure: Failure) -> None:
    """Print the cause, with its trace if it has one, to stderr."""
    print(f"{failure.trace}error: {failure.message}", file=sys.stderr, flush=True)


def report(failure: Failure) -> None:
    """Post the cause from a worker; where no launcher can read it, say it."""
    try:
        first = "MASTER_ADDR" not in os.environ or post(connect_from_environment(), failure)
    except dist.DistError:  # the store is gone
        say(failure)
        return
    if first and STARTED not in os.environ:
        say(failure)
