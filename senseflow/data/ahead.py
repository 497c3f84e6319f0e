"""Files read by threads while what came before is worked on."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import chain, islice
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")

GROUPS = 3  # in the making: one that is worked on, two that are read


def in_order(
    read: Callable[[S], T], things: Iterable[S], num_threads: int, ahead: int
) -> Generator[T, None, None]:
    """What threads read of things, in the order of these, at most `ahead` of them waiting."""
    rest, waiting = iter(things), deque[Future[T]]()
    pool = ThreadPoolExecutor(max(1, num_threads))
    try:
        waiting.extend(pool.submit(read, thing) for thing in islice(rest, ahead))
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(pool.submit(read, thing) for thing in islice(rest, 1))
            yield result
    finally:
        # Who stopped listening does not wait for files that nobody will look at.
        pool.shutdown(wait=False, cancel_futures=True)


def in_groups(
    read: Callable[[S], T], groups: Sequence[Sequence[S]], num_threads: int
) -> Iterator[tuple[Sequence[S], list[T]]]:
    """Each group with what threads read of its things, in order."""
    ahead = GROUPS * max(map(len, groups), default=0)
    with closing(in_order(read, chain.from_iterable(groups), num_threads, ahead)) as results:
        for group in groups:
            yield group, list(islice(results, len(group)))
