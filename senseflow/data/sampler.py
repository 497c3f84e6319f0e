"""Which sample stands where: a function of the seed and the position, so that nothing is stored.

The sample at index i of iteration n's global batch has the position p = (n - 1) B + i; epoch
p // num is a permutation of the data set that depends on the seed and the epoch alone. Every sample
comes once per epoch over all ranks, and a run that goes on, on any number of ranks and with any
accumulation, meets the same global batches.
"""

import signal
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from senseflow.core.draws import Draws
from senseflow.data.json_images import Item, JsonImages, Position


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank."""

    images: Tensor  # (b, 3, H, W) in [-1, 1]
    prompts: list[str]
    indices: list[int]  # of each sample in the iteration's global batch
    unreadable: list[tuple[str, str]] = field(default_factory=list)  # (path, reason)

    def pin_memory(self) -> "Batch":
        """The same with images in pinned memory; DataLoader calls it."""
        return replace(self, images=self.images.pin_memory())


@dataclass(frozen=True)
class Share:
    """One rank's share of the global batches."""

    seed: int
    batch_size: int  # global
    grad_accumulation: int = 1
    rank: int = 0
    world_size: int = 1


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, num: int) -> Tensor:
    """A permutation (num,) of the data set."""
    return torch.randperm(num, generator=Draws(seed, epoch, ()).shared("epoch"))


def item_at(seed: int, position: int, num: int) -> int:
    """The data set's item at a global position."""
    return int(epoch_order(seed, position // num, num)[position % num])


@dataclass(frozen=True)
class MicroBatches(Sampler[list[Position]]):
    """The micro-batches of one rank from `start` on, without end."""

    share: Share
    num: int  # samples in the data set
    start: int  # iteration

    def __iter__(self) -> Iterator[list[Position]]:
        share = self.share
        size, rest = divmod(share.batch_size, share.world_size * share.grad_accumulation)
        assert rest == 0, "checked by check_split"
        first = share.rank * share.grad_accumulation * size
        iteration = self.start
        while True:
            for micro in range(share.grad_accumulation):
                begin = first + micro * size
                yield [self.position(iteration, i) for i in range(begin, begin + size)]
            iteration += 1

    def position(self, iteration: int, index: int) -> Position:
        p = (iteration - 1) * self.share.batch_size + index
        return Position(iteration, index, item_at(self.share.seed, p, self.num))


def collate(items: list[Item]) -> Batch:
    """Stack the samples of a micro-batch."""
    return Batch(
        images=torch.stack([item.image for item in items]),
        prompts=[item.prompt for item in items],
        indices=[item.index for item in items],
        unreadable=[bad for item in items for bad in item.unreadable],
    )


def ignore_interrupts(worker: int) -> None:
    """A signal may reach the whole job; the run itself saves, stops and ends its workers."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def batches(
    dataset: JsonImages, share: Share, num_workers: int, pin_memory: bool, start: int
) -> Iterator[list[Batch]]:
    """This rank's micro-batches, one list per iteration from `start` on, without end."""
    loader = iter(
        DataLoader(
            dataset,
            batch_sampler=MicroBatches(share, len(dataset), start),
            collate_fn=collate,
            num_workers=num_workers,
            pin_memory=pin_memory,
            multiprocessing_context="spawn" if num_workers else None,
            worker_init_fn=ignore_interrupts,
        )
    )
    while True:
        yield [next(loader) for _ in range(share.grad_accumulation)]
