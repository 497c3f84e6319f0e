"""Implicit distribution alignment (IDA), SenseFlow Eq. 9."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

PORTION = 2**26
"""Elements that are copied at a time where two networks are compared: 256 MiB in float32."""


@torch.no_grad()
def align_(
    phi: Iterable[Tensor], theta: Iterable[Tensor], lam: float, taken: Tensor | None = None
) -> None:
    """phi <- lam phi + (1 - lam) theta, in place, after every update of the generator (Eq. 9).

    phi, theta: the parameters of the fake score and the generator, in the same order; float32
    masters, sharded alike or not at all. lam = 1 leaves phi alone, lam = 0 copies theta.
    taken: whether that update was made, 0-d, 1 or 0, read where it is; with 0 phi is left alone.
    Raises ValueError when the two networks do not have the same parameters.
    """
    phi, theta = list(phi), list(theta)
    require_alike(phi, theta)
    # lerp's weight is the share of theta. phi's moments in AdamW are left as they are.
    if taken is None:
        torch._foreach_lerp_(phi, theta, 1 - lam)
    else:
        torch._foreach_lerp_(phi, theta, [(1 - lam) * taken] * len(phi))


def require_alike(phi: Sequence[Tensor], theta: Sequence[Tensor]) -> None:
    """Raise ValueError when two networks do not have the same parameters."""
    if [p.shape for p in phi] != [p.shape for p in theta]:
        raise ValueError(
            f"IDA needs fake score and generator of one architecture: {len(phi)} and {len(theta)} "
            "parameters, of other shapes"
        )


@torch.no_grad()
def squared_gap(phi: Iterable[Tensor], theta: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """||phi - theta||^2 and ||theta||^2 over these (local shards of) parameters, 0-d float32.

    Their ratio's square root, summed over ranks first, is the relative distance of fake score and
    generator that IDA keeps small.
    """
    gaps: list[Tensor] = []
    sizes: list[Tensor] = []
    for kept, other in _portions(zip(phi, theta, strict=True)):
        moved = [torch.empty_like(p, dtype=torch.float32) for p in kept]
        torch._foreach_copy_(moved, kept)
        torch._foreach_sub_(moved, other)
        gaps += torch._foreach_norm(moved)
        sizes += torch._foreach_norm(other, dtype=torch.float32)
    # Squares, whose sums over shards and ranks add up; the root comes after them.
    return torch.stack(gaps).square().sum(), torch.stack(sizes).square().sum()


def _portions(pairs: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[list[Tensor], ...]]:
    """Pairs of tensors in a few lists of PORTION elements or, of larger tensors, one pair."""
    kept: list[Tensor] = []
    other: list[Tensor] = []
    num = 0
    for p, q in pairs:
        if kept and num + p.numel() > PORTION:
            yield kept, other
            kept, other, num = [], [], 0
        kept.append(p)
        other.append(q)
        num += p.numel()
    if kept:
        yield kept, other
