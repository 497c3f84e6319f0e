"""The elements of a list of parameters in one order, whoever holds them, and this rank's of them.

What is worked on in float32 for a moment (weights that are kept in bfloat16, moments in fewer bits)
is taken in groups of a few million elements, so that no network is ever whole in float32; what is
drawn for an element is a function of its number, so that it does not depend on the sharding, and
ranks that hold the same rows (HSDP) draw the same.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

P = ParamSpec("P")
R = TypeVar("R")
GROUP = 2**22  # elements at most: 16 MiB in float32


@dataclass(frozen=True)
class Stretch:
    """Elements start..stop of this rank's shard of a parameter, flattened."""

    index: int  # of the parameter in its list
    start: int
    stop: int
    number: int  # of the first one, among all elements of all parameters of the list

    def of(self, shard: Tensor, block: int = 1) -> Tensor:
        """Its part of a flat shard that holds one value per `block` elements."""
        return shard[self.start // block : self.stop // block]

    def __len__(self) -> int:
        return self.stop - self.start


@torch.no_grad()
def local_shards(parameters: Iterable[Tensor]) -> list[Tensor]:
    """This rank's part of each parameter, as plain tensors that share its memory."""
    # Without gradients to_local reads an attribute, of a tensor that needs none. FLUX's optimizer
    # asks for seven thousand of them at every step: nothing else is done with each.
    return [p.to_local() if isinstance(p, DTensor) else p.detach() for p in parameters]


def flat_shards(parameters: Iterable[Tensor]) -> list[Tensor]:
    """This rank's part of each parameter, as rows that share its memory."""
    return [shard.view(-1) for shard in local_shards(parameters)]


def groups(
    parameters: Sequence[Tensor], chosen: Sequence[bool] | None = None
) -> Iterator[list[Stretch]]:
    """This rank's elements of the chosen parameters (None: of all) in groups of at most GROUP."""
    group: list[Stretch] = []
    size = number = 0
    for index, (parameter, shard) in enumerate(
        zip(parameters, local_shards(parameters), strict=True)
    ):
        num = shard.numel() if chosen is None or chosen[index] else 0
        first = number + (first_element(parameter) if num else 0)
        for start in range(0, num, GROUP):
            stretch = Stretch(index, start, min(start + GROUP, num), first + start)
            if size + len(stretch) > GROUP:
                yield group
                group, size = [], 0
            group.append(stretch)
            size += len(stretch)
        # By the whole parameter, so that an element's number is the same however it is sharded.
        number += parameter.numel()
    if group:
        yield group


def numbers_of(group: Sequence[Stretch], device: torch.device) -> Tensor:
    """The number of each element of a group, from which its random bits come; (n,) int64."""
    return torch.cat([torch.arange(s.number, s.number + len(s), device=device) for s in group])


def fused(function: Callable[P, R], compiled: bool) -> Callable[P, R]:
    """The function, or its compiled form: for work on groups, which is many passes over few bytes.

    One compiled form serves groups of all sizes.
    """
    return torch.compile(function, dynamic=True) if compiled else function


def first_element(parameter: Tensor) -> int:
    """Where this rank's rows begin in the flattened parameter."""
    if not isinstance(parameter, DTensor) or parameter.ndim == 0:
        return 0
    _, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    assert not any(offset[1:]), "sharded in its rows alone"
    return offset[0] * prod(parameter.shape[1:])
