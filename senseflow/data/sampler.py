"""Which sample stands where: a function of the seed and the position, so that nothing is stored.

The sample at index i of iteration n's global batch has the position p = (n - 1) B + i; epoch
p // num is a permutation of the data set that depends on the seed and the epoch alone. Every sample
comes once per epoch over all ranks, and a run that goes on, on any number of ranks and with any
accumulation, meets the same global batches.

Where iterations train for rewards, the samples of a group are one: that at its first index. The
items between are passed over.

Where real samples are to be drawn apart from the prompts (DMD2), a second permutation, of another
stream of the same seed, gives each position a second sample, with the same promises.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from senseflow.common.signals import ignore_stop_signals, stop_signals_blocked
from senseflow.core.draws import Draws
from senseflow.data.items import Item, Position, Samples
from senseflow.teachers.encoded import NOTHING, Change, Encoded


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank: prompts, what belongs to them, and what is known of both.

    Images or latents; neither where a cache knows all that is asked of the images, or where there
    are none.
    """

    prompts: list[str]
    indices: list[int]  # of each sample in the iteration's global batch
    images: Tensor | None = None  # (b, 3, H, W) in [-1, 1]; None where the data are latents
    latents: Tensor | None = None  # (b, C, h, w) float32, scaled; None where the data are images
    fields: list[dict[str, Any]] = field(default_factory=list)  # of each prompt: its row of a table
    encoded: Encoded = NOTHING  # what a cache knows of prompts and images
    unreadable: list[tuple[str, str]] = field(default_factory=list)  # (path, reason), other's too
    other: "Batch | None" = None  # a second, independent draw of as many samples

    @property
    def real(self) -> "Batch":
        """The real samples: a draw of their own, or those that belong to the prompts."""
        return self.other or self

    @property
    def has_images(self) -> bool:
        """Whether there are images to the prompts, in any form."""
        stored = (self.images, self.latents, self.encoded.posterior)
        return any(form is not None for form in stored)

    def pin_memory(self) -> "Batch":
        """A copy in pinned memory; DataLoader calls it."""
        return self.map(Tensor.pin_memory)

    def map(self, change: Change) -> "Batch":
        """A batch with all tensors changed alike."""
        return replace(
            self,
            images=None if self.images is None else change(self.images),
            latents=None if self.latents is None else change(self.latents),
            encoded=self.encoded.map(change),
            other=self.other and self.other.map(change),
        )


@dataclass(frozen=True)
class Share:
    """One rank's share of the global batches."""

    seed: int
    batch_size: int  # global
    grad_accumulation: int = 1
    rank: int = 0
    world_size: int = 1
    separate_real: bool = False  # Batch.other holds real samples drawn apart from the prompts
    group_size: int = 1  # samples of one prompt in every `group_every`-th iteration
    group_every: int = 1


@lru_cache(maxsize=4)  # two epochs of two draws
def epoch_order(seed: int, epoch: int, num: int, separate: bool) -> Tensor:
    """A permutation (num,) of the data set."""
    purpose = "epoch separate" if separate else "epoch"
    return torch.randperm(num, generator=Draws(seed, epoch, ()).shared(purpose))


def item_at(seed: int, position: int, num: int, separate: bool = False) -> int:
    """The data set's item at a global position, of the prompts' draw or the separate one."""
    return int(epoch_order(seed, position // num, num, separate)[position % num])


@dataclass(frozen=True)
class MicroBatches(Sampler[list[Position]]):
    """The micro-batches of one rank from `start` on, without end.

    With separate_real the second half of each holds the positions of the second draw.
    """

    share: Share
    num: int  # samples in the data set
    start: int  # iteration

    def __iter__(self) -> Iterator[list[Position]]:
        share = self.share
        size, rest = divmod(share.batch_size, share.world_size * share.grad_accumulation)
        assert rest == 0, "checked by check_split"
        first = share.rank * share.grad_accumulation * size
        iteration = self.start
        draws = (False, True) if share.separate_real else (False,)
        while True:
            for micro in range(share.grad_accumulation):
                indices = range(first + micro * size, first + (micro + 1) * size)
                yield [self.position(iteration, i, draw) for draw in draws for i in indices]
            iteration += 1

    def position(self, iteration: int, index: int, separate: bool = False) -> Position:
        """The sample at `index` of an iteration's global batch, of the separate draw if so."""
        share, first = self.share, index
        if not separate and iteration % share.group_every == 0:
            first -= index % share.group_size
        p = (iteration - 1) * share.batch_size + first
        item = item_at(share.seed, p, self.num, separate)
        return Position(iteration, index, item, separate)


def collate(items: list[Item], separate_real: bool) -> Batch:
    """Stack the samples of a micro-batch; with separate_real the second half becomes `other`."""
    if separate_real:
        half = len(items) // 2
        batch, other = _stack(items[:half]), _stack(items[half:])
    else:
        batch, other = _stack(items), None
    return replace(batch, other=other, unreadable=[bad for i in items for bad in i.unreadable])


def _stack(items: list[Item]) -> Batch:
    images = [item.image for item in items if item.image is not None]
    latents = [item.latents for item in items if item.latents is not None]
    return Batch(
        prompts=[item.prompt for item in items],
        indices=[item.index for item in items],
        images=torch.stack(images) if images else None,
        latents=torch.stack(latents) if latents else None,
        fields=[item.fields for item in items],
        encoded=Encoded.stack([item.encoded for item in items]),
    )


def batches(
    dataset: Samples, share: Share, num_workers: int, pin_memory: bool, start: int
) -> Iterator[list[Batch]]:
    """This rank's micro-batches, one list per iteration from `start` on, without end."""
    loader = DataLoader(
        cast(Dataset[Item], dataset),
        batch_sampler=MicroBatches(share, len(dataset), start),
        collate_fn=partial(collate, separate_real=share.separate_real),
        num_workers=num_workers,
        pin_memory=pin_memory,
        # A fork would take over CUDA's state and locks that other threads hold.
        multiprocessing_context="spawn" if num_workers else None,
        worker_init_fn=ignore_stop_signals,
    )
    with stop_signals_blocked() if num_workers else nullcontext():
        samples = iter(loader)
    while True:
        yield [next(samples) for _ in range(share.grad_accumulation)]
