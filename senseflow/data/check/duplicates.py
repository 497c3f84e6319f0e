"""Groups of images that are the same picture: equal pixels, or nearly so.

Near duplicates are pairs whose perceptual hashes differ in at most BITS of 64 and whose thumbnails
in at most LEVELS of 255 on the mean. What JPEG, resizing or a little brightness do to a photograph
stays below both; a mirror image, other colours or a larger crop do not.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from senseflow.data.check.looking import LOWEST, Look

BITS = 4
LEVELS = 10.0
BANDS = BITS + 1  # two hashes that differ in BITS agree in one of so many parts
BAND_BITS = 64 // BANDS
BLOCK = 2**22  # hashes compared at once
PAIRS = 2**16  # thumbnails compared at once


def exact_groups(looks: Sequence[Look | None]) -> list[list[int]]:
    """Places of images with equal pixels, groups of two and more; None is of no group."""
    return [group for group in _by_pixels(looks) if len(group) > 1]


def near_groups(looks: Sequence[Look | None]) -> list[list[int]]:
    """Places of images that nearly are one; of those with equal pixels the first alone counts."""
    places = [group[0] for group in _by_pixels(looks)]
    kept = [look for place in places if (look := looks[place]) is not None]
    parents = list(range(len(kept)))
    first: dict[tuple[int, bytes], int] = {}
    for number, look in enumerate(
        kept
    ):  # blank pages: thousands of them would be millions of pairs
        parents[number] = first.setdefault((look.hash, look.thumbnail), number)
    numbers = [*first.values()]
    for a, b in _near_pairs([kept[number] for number in numbers]):
        one, other = numbers[a], numbers[b]
        parents[_root(parents, max(one, other))] = _root(parents, min(one, other))
    groups: dict[int, list[int]] = {}
    for number, place in enumerate(places):
        groups.setdefault(_root(parents, number), []).append(place)
    return [group for group in groups.values() if len(group) > 1]


def _by_pixels(looks: Sequence[Look | None]) -> list[list[int]]:
    """Places of readable images, those with equal pixels together, by the first of each group."""
    places: dict[bytes, list[int]] = {}
    for place, look in enumerate(looks):
        if look is not None:
            places.setdefault(look.digest, []).append(place)
    return [*places.values()]


def _near_pairs(looks: list[Look]) -> Iterator[tuple[int, int]]:
    """Pairs of numbers in `looks`, each once."""
    hashes = np.array([look.hash for look in looks], np.uint64)
    thumbnails = np.frombuffer(b"".join(look.thumbnail for look in looks), np.uint8)
    thumbnails = thumbnails.reshape(len(looks), 3 * LOWEST**2)
    for band in range(BANDS):
        keys = _part(hashes, band)
        order = np.argsort(keys, kind="stable")
        edges = np.flatnonzero(np.diff(keys[order])) + 1
        groups = [group for group in np.split(order, edges) if len(group) > 1]
        for group in groups:
            for pairs in _alike(group, hashes, band):
                levels = thumbnails[pairs[:, 0]].astype(np.int16) - thumbnails[pairs[:, 1]]
                near = np.abs(levels).mean(1) <= LEVELS
                yield from map(tuple, pairs[near].tolist())


def _alike(group: np.ndarray, hashes: np.ndarray, band: int) -> Iterator[np.ndarray]:
    """The pairs (p, 2) of a group (n,) whose hashes are near, some at a time.

    The group agrees in `band`; pairs that agree in an earlier one were found there.
    """
    step = max(1, BLOCK // len(group))
    for start in range(0, len(group), step):
        rows = group[start : start + step]
        apart = hashes[rows, None] ^ hashes[None, group]  # (rows, n)
        near = (np.bitwise_count(apart) <= BITS) & (rows[:, None] < group[None])
        for earlier in range(band):
            near &= _part(apart, earlier) != 0
        found = np.argwhere(near)
        for first in range(0, len(found), PAIRS):
            i, j = found[first : first + PAIRS].T
            yield np.stack([rows[i], group[j]], 1)


def _part(hashes: np.ndarray, band: int) -> np.ndarray:
    """The bits of a band."""
    return (hashes >> np.uint64(BAND_BITS * band)) & np.uint64(2**BAND_BITS - 1)


def _root(parents: list[int], number: int) -> int:
    while parents[number] != number:
        parents[number] = parents[parents[number]]
        number = parents[number]
    return number
