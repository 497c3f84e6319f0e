"""Ranks that measure together: each takes every n-th image, what they found is put together."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from senseflow.common.environment import own_position
from senseflow.common.ranks import start_ranks
from senseflow.engine.disk import HostGroup

T = TypeVar("T")

SAID_WITHIN_S = 5  # rank 0 has told of an error that all ranks end with


@dataclass(frozen=True)
class Share:
    """This process among those torchrun started, or alone.

    All methods but `mine` must be called by all ranks, in the same order.
    """

    rank: int = 0
    world_size: int = 1
    host: HostGroup | None = None  # None: alone

    @classmethod
    def of_torchrun(cls) -> "Share":
        """This process among those that RANK and WORLD_SIZE tell of; alone where they do not."""
        if own_position().world_size == 1:
            return cls()
        ranks = start_ranks()
        return cls(ranks.rank, ranks.world_size, HostGroup(ranks))

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes and speaks."""
        return self.rank == 0

    def mine(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's items: every world_size-th, from its own number on."""
        return items[self.rank :: self.world_size]

    def gather(self, mine: T) -> list[T]:
        """One object of every rank, on all of them."""
        return self.host.gather(mine) if self.host else [mine]

    def put_together(self, mine: Sequence[T]) -> list[T]:
        """One thing per item of `mine`, from all ranks, in the order of the items."""
        parts = self.gather(mine)
        longest = max(map(len, parts))
        return [part[place] for place in range(longest) for part in parts if place < len(part)]

    def agreed(self, action: Callable[[], T]) -> T:
        """Act on every rank; where one raises ValueError or OSError, all end: rank 0 says it."""
        if not self.host:
            return action()
        results: list[T] = []
        failure = None
        try:
            results.append(action())
        except (ValueError, OSError) as error:
            failure = str(error)
        if failure := self.host.first(failure):
            if self.is_main:
                raise ValueError(failure)
            time.sleep(SAID_WITHIN_S)  # torchrun stops all ranks when the first one ends
            raise SystemExit(2)
        return results[0]

    def of_main(self, action: Callable[[], T]) -> T:
        """Rank 0 alone acts; all get its result."""
        mine = self.agreed(lambda: [action()] if self.is_main else [])
        return self.gather(mine)[0][0]
