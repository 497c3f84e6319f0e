"""What an iteration measures: detached 0-d tensors and times, gathered without waiting."""

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from senseflow.common.ranks import Ranks, sum_over_ranks

P = ParamSpec("P")
R = TypeVar("R")


class Stopwatch:
    """Seconds spent in each phase of the iteration: CUDA events on a GPU, else the host's clock."""

    def __init__(self) -> None:
        self.spans: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = defaultdict(list)
        self.seconds: dict[str, float] = defaultdict(float)
        self.current: str | None = None  # the phase that runs

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Time what is inside as the phase `name`; the phase around it goes on afterwards."""
        outer, self.current = self.current, name
        try:
            with self._timed(name):
                yield
        finally:
            self.current = outer

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        if torch.cuda.is_available():
            # The host runs ahead of the device: its clock would time the launches alone.
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self.spans[name].append((start, end))
        else:
            began = time.perf_counter()
            yield
            self.seconds[name] += time.perf_counter() - began

    def read(self) -> dict[str, float]:
        """Seconds per phase since the last reading; waits for the device."""
        if self.spans:
            torch.cuda.synchronize()
        for name, spans in self.spans.items():
            self.seconds[name] += sum(start.elapsed_time(end) for start, end in spans) / 1000
        result = dict(self.seconds)
        self.spans.clear()
        self.seconds.clear()
        return result


STOPWATCH = Stopwatch()


def phase(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Count the time spent in a function under `time_s/<name>`."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def timed(*args: P.args, **kwargs: P.kwargs) -> R:
            with STOPWATCH.measure(name):
                return function(*args, **kwargs)

        return timed

    return decorate


@dataclass(frozen=True)
class Step:
    """A step of one network, and whether it was taken: one that is not finite changes nothing."""

    iteration: int
    network: str
    taken: bool


class Measures:
    """Means over micro-batches and iterations of named 0-d tensors; no host sync until `read`.

    steps: those between the last two readings, alike on all ranks, since a norm is of all shards.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = defaultdict(int)
        self.norms: list[tuple[int, str, Tensor]] = []  # iteration, network, gradient norm
        self.steps: list[Step] = []

    def add(self, values: dict[str, Tensor]) -> None:
        """Add detached 0-d values to the means of their names; the host does not wait."""
        for name, value in values.items():
            value = value.detach().float()
            self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()
            self.counts[name] += 1

    def add_step(self, iteration: int, network: str, norm: Tensor) -> None:
        """Add the gradient norm of a network's step, which was taken if the norm is finite."""
        self.add({f"grad_norm/{network}": norm})
        self.norms.append((iteration, network, norm.detach()))

    def read(self, ranks: Ranks) -> dict[str, float]:
        """Means since the last reading, averaged over ranks, and `steps`, in one transfer; then
        start afresh."""
        # One order on all ranks, which sum them by place.
        names = sorted(self.sums)
        if not names:
            return {}
        means = torch.stack([(self.sums[n] / self.counts[n]).to(ranks.device) for n in names])
        means = sum_over_ranks(means, ranks) / ranks.world_size
        norms = [norm.to(ranks.device) for *_, norm in self.norms]
        numbers = torch.stack([*means, *norms]).tolist()
        found = zip(self.norms, numbers[len(names) :], strict=True)
        self.steps = [Step(i, network, isfinite(norm)) for (i, network, _), norm in found]
        self.sums.clear()
        self.counts.clear()
        self.norms.clear()
        return dict(zip(names, numbers, strict=False))


def image_statistics(images: Tensor) -> Tensor:
    """Mean, contrast (standard deviation) and saturation of images in [-1, 1]; (3,), on [0, 1]."""
    images = (images.detach().float().clamp(-1, 1) + 1) / 2
    saturation = images.amax(1) - images.amin(1)
    mean = images.mean((1, 2, 3), keepdim=True)
    contrast = (images - mean).square().mean((1, 2, 3)).sqrt()  # torch's own std is slow on rows
    return torch.stack([mean.mean(), contrast.mean(), saturation.mean()])


def image_drift(generated: Tensor, real: Tensor) -> dict[str, Tensor]:
    """How far generated images have moved from real ones in mean, contrast and saturation.

    Both (B, 3, H, W) in [-1, 1]; the differences are in units of [0, 1]. A steady drift of one of
    them is the first sign of collapse.
    """
    drift = image_statistics(generated) - image_statistics(real)
    names = ("drift/mean", "drift/contrast", "drift/saturation")
    return dict(zip(names, drift.unbind(), strict=True))
