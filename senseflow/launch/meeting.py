"""Where the launchers of all nodes meet: a store that one of them keeps for the whole run.

torchrun runs on top of it with its static rendezvous, which shares a store its own process already
keeps. Of torchrun's two rendezvous this is the one whose ranks follow the node ranks; neither
notices a node that fails, which `senseflow.launch.watch` does, so nothing is lost by it.
"""

import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import psutil
import torch.distributed as dist
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

from senseflow.common.environment import whole_number
from senseflow.common.fields import CountOrNone, Port
from senseflow.launch.watch import board_name

T = TypeVar("T")

FIRST_MEETING_S = 900  # nodes of a job boot one after the other
ANSWER_S = 10  # what a store that can be reached takes much less than


class NodeGoneError(ConnectionError):
    """Another node did not come, or cannot be reached any more."""


@dataclass(frozen=True)
class Place:
    """Where to meet, as the environment says."""

    host: str
    port: int
    node_rank: int | None  # None: as they come
    job: str = ""  # sets the runs that meet at one place apart

    @property
    def keeps_store(self) -> bool:
        """Whether this node keeps the store, and so is node 0; raises ValueError."""
        try:
            own = is_own(self.host)
        except socket.gaierror as error:
            raise ValueError(f"no host is known here as {self.host!r}: {error}") from error
        return own if self.node_rank is None else self.node_rank == 0


def place_from(environment: dict[str, str], nodes: int) -> Place:
    """From NODE_RANK, MASTER_ADDR and MASTER_PORT, or from torchrun's PET_RDZV_ENDPOINT and _ID.

    With torchrun's, the node whose address is in the endpoint keeps the store and is node 0; the
    others are numbered as they come. Raises ValueError for what is missing or badly formed.
    """
    if nodes == 1:
        return Place("127.0.0.1", 0, 0)
    if "PET_RDZV_ENDPOINT" in environment:
        backend = environment.get("PET_RDZV_BACKEND", "c10d")
        if backend not in ("c10d", "static"):
            raise ValueError(f"PET_RDZV_BACKEND {backend!r}: c10d is the one that is known here")
        host, port = parse_rendezvous_endpoint(environment["PET_RDZV_ENDPOINT"], default_port=29400)
        return Place(host, port, None, environment.get("PET_RDZV_ID", ""))
    names = ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if not environment.get(name)]
    if missing:
        raise ValueError(
            f"{nodes} nodes need {', '.join(missing)} in the environment of each (or torchrun's "
            "PET_RDZV_ENDPOINT)"
        )
    rank = whole_number("NODE_RANK", environment["NODE_RANK"], CountOrNone)
    port = whole_number("MASTER_PORT", environment["MASTER_PORT"], Port)
    if rank >= nodes:
        raise ValueError(f"NODE_RANK {rank} is not below NODES {nodes}: nodes are counted from 0")
    return Place(environment["MASTER_ADDR"], port, rank)


class Meeting:
    """This launcher among those of all nodes.

    rank: of this node. host, port: of the store. store: under the prefix of the job.
    """

    def __init__(self, place: Place, nodes: int, stopped: Callable[[], bool]) -> None:
        """Start or find the store.

        stopped: asked while waiting; True ends the wait as if the others had not come. Raises
        ValueError for a place that cannot be, NodeGoneError when node 0 does not come.
        """
        self.nodes, self.stopped, self.job, self.host = nodes, stopped, place.job, place.host
        if place.keeps_store:
            store = start_store(place)
        else:
            wait_for_store(place, stopped)
            store = dist.TCPStore(
                place.host, place.port, timeout=timedelta(seconds=60), wait_for_workers=False
            )
        self.port, self.whole_store = store.port, store
        self.store = dist.PrefixStore(f"launchers/{place.job}", store)
        self.rank = place.node_rank if place.node_rank is not None else self._number(place)
        self._sign_in()

    def _number(self, place: Place) -> int:
        rank = 0 if place.keeps_store else self.store.add("nodes", 1)
        if rank >= self.nodes:
            raise ValueError(f"more than NODES {self.nodes} came to {self.host}:{self.port}")
        return rank

    def _sign_in(self) -> None:
        key, me = f"node/{self.rank}", f"{socket.gethostname()} (pid {os.getpid()})"
        there = self.store.compare_set(key, "", me).decode()
        if there != me:
            raise ValueError(f"NODE_RANK {self.rank} is taken by {there}: each node needs its own")
        if self.nodes > 1:
            self.store.set(f"address/{self.rank}", address_towards(self.host))

    def gather(self, key: str, seconds: float) -> bool:
        """Come to `key` and wait for the launchers of all nodes; whether they came in time.

        A stop request ends the wait. Raises NodeGoneError when the store does not answer.
        """
        deadline = time.monotonic() + seconds
        come = self.ask(lambda: self.store.add(key, 1))
        while come < self.nodes and time.monotonic() < deadline and not self.stopped():
            time.sleep(0.3)
            come = self.ask(lambda: self.store.add(key, 0))
        return come >= self.nodes

    def board(self, run_id: str) -> dist.Store:
        """Where the workers of one start post failures."""
        return dist.PrefixStore(board_name(run_id), self.whole_store)

    def ask(self, operation: Callable[[], T]) -> T:
        """An operation on the store, which by itself would wait for ever on a dead network."""
        try:
            return bounded(operation, ANSWER_S)
        except (dist.DistError, TimeoutError) as error:
            raise NodeGoneError(
                f"node 0 at {self.host}:{self.port} cannot be reached any more: its host, its "
                "launcher or the network to it is gone"
            ) from error

    def interface(self) -> str | None:
        """The network interface towards the other nodes, once they have come, for gloo; None where
        it has no name."""
        if self.nodes == 1:
            return interface_of("127.0.0.1")
        peer = self.host if self.rank else self.ask(lambda: self.store.get("address/1")).decode()
        return interface_of(address_towards(peer))

    def flags(self, run_id: str) -> list[str]:
        """torchrun's flags to meet here."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return [
            f"--nnodes={self.nodes}",
            f"--node-rank={self.rank}",
            "--rdzv-backend=static",
            f"--rdzv-endpoint={host}:{self.port}",
            f"--rdzv-id={run_id}",
        ]


def start_store(place: Place) -> dist.TCPStore:
    """The store that node 0 keeps; raises ValueError when its address cannot be listened on."""
    try:
        return dist.TCPStore(
            place.host,
            place.port,
            is_master=True,
            multi_tenant=True,  # torchrun, in this process, shares it
            timeout=timedelta(seconds=60),
            wait_for_workers=False,
        )
    except dist.DistError as error:
        raise ValueError(
            f"this is node 0, but {place.host}:{place.port} cannot be listened on: is MASTER_ADDR "
            "the address of this host, and MASTER_PORT free?"
        ) from error


def wait_for_store(place: Place, stopped: Callable[[], bool]) -> None:
    """Until node 0 listens; raises NodeGoneError when it does not within FIRST_MEETING_S."""
    deadline = time.monotonic() + FIRST_MEETING_S
    while not stopped():
        try:
            # A socket before TCPStore, whose own wait hears of no stop request.
            with socket.create_connection((place.host, place.port), timeout=2):
                return
        except OSError as error:
            if time.monotonic() > deadline:
                raise NodeGoneError(
                    f"node 0 at {place.host}:{place.port} did not answer within "
                    f"{FIRST_MEETING_S // 60} minutes: {error}"
                ) from error
        time.sleep(0.3)
    raise NodeGoneError("stopped while waiting for node 0")


def bounded(operation: Callable[[], T], seconds: float) -> T:
    """The result of `operation`; TimeoutError when it takes longer, in a thread left behind."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(operation())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no answer within {seconds} s")
    return results[0]


def address_towards(host: str) -> str:
    """This host's address on the way to another; no packet is sent."""
    family, kind, _, _, address = socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])


def interface_of(address: str) -> str | None:
    """The name of the interface that has this address."""
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in entries):
            return str(name)
    return None


def is_own(host: str) -> bool:
    """Whether a host name or address is this machine's."""
    resolved = {str(entry[4][0]) for entry in socket.getaddrinfo(host, 1)}
    return any(interface_of(address) for address in resolved)
