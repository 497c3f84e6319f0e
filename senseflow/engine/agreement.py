"""What ranks must agree on, so that a difference between them is an error and never a hang.

Every rank calls every network in the same order; what that order hangs on (the configuration, the
data, the shared draws) is compared when a run starts and the turns ahead at every iteration.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from senseflow.common.ranks import AgreedError, Ranks
from senseflow.common.signals import StopRequest
from senseflow.distill.state import Turn


class DisagreementError(AgreedError):
    """Ranks would go different ways."""


def require_equal(parts: Mapping[str, Any]) -> None:
    """Raise DisagreementError on every rank, naming the parts whose `repr` is not equal on all."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, {name: digest(part) for name, part in parts.items()})
    differing = [
        description
        for name in parts
        if (description := _differing(name, [theirs[name] for theirs in everyone]))
    ]
    if differing:
        raise DisagreementError(
            f"ranks disagree: {'; '.join(differing)}. Give every node the same command, "
            "configuration, data, teacher and version of torch"
        )


def digest(part: Any) -> int:
    """A fingerprint of a value's `repr`, within int64."""
    return int.from_bytes(hashlib.sha256(repr(part).encode()).digest()[:7])


def _differing(name: str, digests: list[int]) -> str:
    """Who is unlike rank 0; empty when nobody is."""
    others = [str(rank) for rank, value in enumerate(digests) if value != digests[0]]
    shown = ", ".join(others[:8]) + (", ..." if len(others) > 8 else "")
    return f"{name} (rank 0 unlike {shown})" if others else ""


class Agreement:
    """What ranks tell each other once per iteration: stop requests, the files they could not read,
    and the turn they will draw.

    Rows are gathered on the host while the next iteration computes, so nothing waits for a device;
    all ranks learn them in the same iteration, one later. The turn in a row is therefore that of
    two iterations ahead, and a rank that would call other networks is found before it does.
    """

    AHEAD = 2

    def __init__(self, ranks: Ranks, stop: StopRequest) -> None:
        self.ranks = ranks
        self.stop = stop
        self.rows = torch.zeros(ranks.world_size, 3, dtype=torch.int64)
        self.pending: dist.Work | None = None

    def reach(self, num_unreadable: int, ahead: Turn) -> tuple[bool, int]:
        """Whether any rank asks to stop, and the unreadable files of all; once per iteration.

        ahead: the turn AHEAD iterations from the present one. Raises DisagreementError.
        """
        mine = torch.tensor([self.stop.reason is not None, num_unreadable, digest(ahead)])
        if self.ranks.world_size == 1:
            self.rows = mine[None]
        elif self.pending:
            self.pending.wait()
        stops, unreadable, turns = self.rows.T.tolist()
        if differing := _differing(f"the turn of iteration {ahead.iteration - 1}", turns):
            raise DisagreementError(f"ranks disagree: {differing}")
        if self.ranks.world_size > 1:
            self.rows = torch.empty_like(self.rows)
            self.pending = dist.all_gather_into_tensor(self.rows, mine[None], async_op=True)
        return any(stops), sum(unreadable)
