"""The host's side of an iteration: no GPU is faster than the process that feeds it.

Every operation costs the host some microseconds of Python and dispatch, however small its tensors;
gathering an FSDP2 unit costs it about a millisecond. Their numbers are counted in the trace. What
each costs is measured on the machine at hand, in about a second, or given.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from senseflow.engine.parallel import shard
from senseflow.plan.fakes import fake_ranks
from senseflow.plan.tracker import PhaseCost, Tracker

WIDTH, NUM_UNITS = 32, 16
Constants = tuple[float | None, float | None]  # seconds of an operation and of a gathering, given


@dataclass(frozen=True)
class Host:
    """Seconds of CPU time, of one process."""

    operation: float
    gathering: float  # of a unit, besides the operations in it
    measured: bool = False  # here

    def seconds(self, cost: PhaseCost) -> float:
        """Of a phase; the host cannot be faster where nothing is compiled."""
        return cost.operations * self.operation + cost.gatherings * self.gathering


class Link(nn.Module):
    """What the blocks of a denoiser are made of, small enough that computing is nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """(1, WIDTH) to (1, WIDTH)."""
        y: Tensor = self.norm(x)
        for layer in self.layers:
            y = nn.functional.silu(layer(y)) * 1.5 + y.flatten(1)
        return x + y


def measure(operation: float | None = None, gathering: float | None = None) -> Host:
    """This machine's constants, in seconds, but for those that are given."""
    if operation is not None and gathering is not None:
        return Host(operation, gathering)
    chain = nn.Sequential(*(Link() for _ in range(NUM_UNITS)))
    plain, counted = run(chain)
    each = plain / counted.operations if operation is None else operation
    if gathering is None:
        with fake_ranks(2, 1) as ranks:  # one alone gathers nothing
            sharded, counted = run(shard(chain, list(chain), ranks.mesh))
        gathering = max(0.0, sharded - each * counted.operations) / counted.gatherings
    return Host(each, gathering, measured=True)


def run(network: nn.Module) -> tuple[float, PhaseCost]:
    """CPU seconds of a forward and a backward on one thread, and what they are counted to be."""
    x, threads = torch.ones(1, WIDTH), torch.get_num_threads()

    def both() -> None:
        network(x).sum().backward()

    torch.set_num_threads(1)
    try:
        both()
        with Tracker() as tracker:
            both()
        return min(timed(both) for _ in range(5)), tracker.phases["between"]
    finally:
        torch.set_num_threads(threads)


def timed(work: Callable[[], None]) -> float:
    """The process's own CPU seconds."""
    began = time.process_time()
    work()
    return time.process_time() - began
