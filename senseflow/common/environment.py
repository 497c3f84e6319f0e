"""What torchrun says of this process in its environment; needs no torch."""

import os
from argparse import ArgumentTypeError
from dataclasses import dataclass
from typing import Any

from senseflow.common.commands import number
from senseflow.common.fields import CountOrNone, Port, SmallCount, Workers


@dataclass(frozen=True)
class Position:
    """This process among those torchrun started, `local_rank` among those of its node."""

    rank: int
    local_rank: int
    world_size: int


def own_position() -> Position:
    """From RANK, LOCAL_RANK and WORLD_SIZE, which are 0, 0 and 1 where they are not set or empty.

    Raises ValueError, naming the variable, for what is no such number; of MASTER_PORT too.
    """
    rank = _number("RANK", "0", CountOrNone)
    local_rank = _number("LOCAL_RANK", "0", Workers)
    world_size = _number("WORLD_SIZE", "1", SmallCount)
    _number("MASTER_PORT", "1", Port)
    if rank >= world_size:
        raise ValueError(
            f"RANK {rank} is not below WORLD_SIZE {world_size} in the environment: torchrun sets "
            "both, one process alone needs neither"
        )
    return Position(rank, local_rank, world_size)


def whole_number(name: str, text: str, kind: Any) -> int:
    """The number of a kind in a variable's text; raises ValueError, with its name, for another."""
    try:
        return int(number(kind)(text))
    except ArgumentTypeError as error:
        raise ValueError(f"{name} {error}") from None


def _number(name: str, default: str, kind: Any) -> int:
    return whole_number(f"{name} of the environment:", os.environ.get(name) or default, kind)
