"""What every data set offers: samples read by their place in the run, and those passed over."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from senseflow.data.image_lists import one_line, said
from senseflow.teachers.encoded import NOTHING, Encoded

logger = logging.getLogger(__name__)


@dataclass(frozen=True, order=True)
class Position:
    """Which sample of the data set stands where in the run."""

    iteration: int
    index: int  # in the iteration's global batch
    item: int  # in the data set
    separate: bool = False  # of the second draw, which the prompts have no part in


@dataclass(frozen=True)
class Item:
    """One sample, and those that were passed over to find it.

    Holds an image or latents; neither where a cache knows all that is asked of the image, or where
    there is none.
    """

    prompt: str
    index: int  # in the iteration's global batch
    image: Tensor | None = None  # (3, H, W) in [-1, 1]
    latents: Tensor | None = None  # (C, h, w) float32, scaled as the diffusion model sees them
    path: str | None = None  # of the image, as the data set lists it
    fields: dict[str, Any] = field(default_factory=dict)  # its row of a table of prompts
    encoded: Encoded = NOTHING  # B = 1
    unreadable: list[tuple[str, str]] = field(default_factory=list)  # (path, reason)


class Samples(Protocol):
    """A data set."""

    def fingerprint(self) -> str:
        """Equal where the same samples stand in the same order, whatever the folder."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, position: Position) -> Item: ...

    def all_prompts(self) -> Iterator[str]:
        """The prompts of all samples, in their order; those that cannot be read are left out."""
        ...


class UnreadableItem(Exception):
    """One sample cannot be read, which others of the data set can make up for."""

    def __init__(self, source: str, reason: str) -> None:
        super().__init__(source, reason)
        self.source, self.reason = source, reason


class UnreadableImagesError(RuntimeError):
    """More samples could not be read than the configuration allows."""


def first_readable(
    read: Callable[[Position, int], Item], at: Position, num: int, max_unreadable: int
) -> Item:
    """The first of the `num` samples from `at.item` on, in the data set's order, that can be read.

    read: a sample by its place in the run and its number; raises UnreadableItem for one that it
    cannot. More than max_unreadable of these in a row, or all there are, raise
    UnreadableImagesError.
    """
    unreadable: list[tuple[str, str]] = []
    for skipped in range(min(num, max_unreadable + 1)):
        try:
            # The next in order, not a new draw: on any number of ranks it is the same one.
            item = read(at, (at.item + skipped) % num)
        except UnreadableItem as error:
            unreadable.append((error.source, error.reason))
            continue
        return replace(item, unreadable=unreadable)
    raise UnreadableImagesError(
        f"{len(unreadable)} of {num} images in a row could not be read, such as "
        f"{said(unreadable[0][0])}: {said(unreadable[0][1])}"
    )


@dataclass
class Unreadable:
    """Counts and lists the samples a run passed over, and stops it past a limit."""

    file: Path  # the list in the run folder
    limit: int
    seen: set[str] = field(default_factory=set)
    known: int = 0  # of those seen, listed by others too, and so known to every rank

    def __post_init__(self) -> None:
        if self.file.exists():
            rows = self.file.read_text(encoding="utf-8").splitlines()
            self.seen |= {row.partition("\t")[0] for row in rows}
        self.known = len(self.seen)

    def note(self, found: list[tuple[str, str]]) -> None:
        """Record samples met in a batch."""
        for path, reason in found:
            name, why = one_line(path), one_line(reason)
            if name in self.seen:
                continue
            self.seen.add(name)
            logger.warning("skipped %s: %s", said(name), said(why))
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(f"{name}\t{why}\n")

    def know(self, names: set[str]) -> None:
        """Take over what other ranks have listed: a file is one, however many meet it."""
        self.seen |= names
        self.known = len(self.seen)

    def check(self, num: int) -> None:
        """Raise UnreadableImagesError when `num` samples, of all ranks together, are too many."""
        if num > self.limit:
            raise UnreadableImagesError(
                f"{num} images could not be read, data.max_unreadable allows {self.limit}; they "
                f"are listed in {self.file}"
            )
