"""A network's tensors by the names of its authors' own files, and back.

diffusers converts such files to its names. Its converters rename tensors, cut them by rows and join
rows, and no more: run on the numbers of rows in place of tensors, they say which rows go where, and
so also the way back, for which diffusers has nothing.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from torch import Size, Tensor

from senseflow.weights.stored import Stored, Weights

logger = logging.getLogger(__name__)

NUM_ROWS = 7 * 3072  # of every tensor of numbers: FLUX's converter cuts at rows of the true width

Name = Callable[[str], str]  # from a tensor's name in diffusers to that of the file it is in


@dataclass(frozen=True)
class Rows:
    """Some consecutive rows of a tensor: where they start and stop, as parts of all its rows."""

    key: str
    start: Fraction
    stop: Fraction


Plan = Mapping[str, list[Rows]]  # the rows that each tensor is made of, in their order


def to_diffusers(network: Any, name: Name, prefix: str) -> Plan:
    """What each tensor of a diffusers network is made of, by names of its authors' files.

    prefix: what stands before the names there, which its converter may need, or not know.

    Raises ValueError for a network which those files cannot hold.
    """
    wanted = network.state_dict().keys()
    names = list(dict.fromkeys(map(name, wanted)))
    # One more apart: where one tensor ends the next one does not go on.
    firsts = {place * (NUM_ROWS + 1): key for place, key in enumerate(names)}
    numbers = {
        prefix + key: torch.arange(first, first + NUM_ROWS, dtype=torch.int32)
        for first, key in firsts.items()
    }
    convert = SINGLE_FILE_LOADABLE_CLASSES[type(network).__name__]["checkpoint_mapping_fn"]
    made = convert(checkpoint=numbers, config=dict(network.config))
    if made.keys() != wanted:
        other = sorted(made.keys() ^ wanted)
        raise ValueError(
            f"a {type(network).__name__} with this config is none of its authors' files: "
            f"{len(other)} tensors differ, such as {', '.join(other[:3])}"
        )
    return {key: _stretches(made[key], names) for key in wanted}


def _stretches(numbers: Tensor, names: list[str]) -> list[Rows]:
    """The consecutive numbers among some, as rows of the tensors they were given to."""
    cuts = (numbers.diff() != 1).nonzero().flatten() + 1
    found = []
    for stretch in numbers.tensor_split(cuts):
        place, first = divmod(int(stretch[0]), NUM_ROWS + 1)
        start, stop = Fraction(first, NUM_ROWS), Fraction(first + len(stretch), NUM_ROWS)
        found.append(Rows(names[place], start, stop))
    return found


def inverse(plan: Plan) -> Plan:
    """What the tensors that a plan takes rows from are made of.

    The plan is `to_diffusers`': each of its tensors is of rows of one other tensor.
    """
    found: dict[str, list[tuple[Fraction, Rows]]] = {}
    for key, pieces in plan.items():
        assert len({piece.key for piece in pieces}) == 1, pieces
        whole, at = sum(piece.stop - piece.start for piece in pieces), Fraction(0)
        for piece in pieces:
            end = at + (piece.stop - piece.start) / whole
            found.setdefault(piece.key, []).append((piece.start, Rows(key, at, end)))
            at = end
    return {key: [rows for _, rows in sorted(pieces, key=_first)] for key, pieces in found.items()}


def _first(piece: tuple[Fraction, Rows]) -> Fraction:
    return piece[0]


@dataclass(frozen=True)
class Joined:
    """Rows of other tensors as one tensor, read when asked for."""

    parts: list[tuple[Stored, slice]]

    @property
    def shape(self) -> Size:
        """(rows, ...) as the parts have them."""
        rows = sum(part.stop - part.start for _, part in self.parts)
        return Size((rows, *self.parts[0][0].shape[1:]))

    def __getitem__(self, rows: Any) -> Tensor:
        return torch.cat([stored[part] for stored, part in self.parts])[rows]


def planned(plan: Plan, read: Callable[[str], Stored]) -> Callable[[str], Stored]:
    """Where the tensors of a plan are read, those it is made of being read by `read`."""

    def part(rows: Rows) -> tuple[Stored, slice]:
        stored = read(rows.key)
        ends = (rows.start * stored.shape[0], rows.stop * stored.shape[0])
        assert all(end.denominator == 1 for end in ends), f"{rows} of {stored.shape}"
        return stored, slice(*map(int, ends))

    def joined(key: str) -> Stored:
        parts = [part(rows) for rows in plan[key]]
        stored, rows = parts[0]
        is_whole = len(parts) == 1 and rows == slice(0, stored.shape[0])
        return stored if is_whole else Joined(parts)

    return joined


def converted(weights: Weights, network: Any, name: Name, prefix: str, authors: str) -> Weights:
    """The weights of an authors' file by diffusers' names, for a network on the meta device.

    prefix: as `to_diffusers` takes it. authors: whose names they are, for the message. Raises
    ValueError naming the keys, by the file's names, that do not fit the network.
    """
    plan, own = to_diffusers(network, name, prefix), network.state_dict()
    held = planned(back := inverse(plan), own.__getitem__)
    weights.require(
        {key: held(key) for key in back}, f"their network in the original names of {authors}"
    )
    logger.info("%s has the original names of %s", weights.source, authors)
    return Weights(weights.source, list(plan), planned(plan, weights.read))
