"""Stateless random draws: a number is a function of what it is for, not of what came before.

A shared draw (the anchor, simulate or not) is a function of (seed, iteration, purpose), a
per-sample draw (noise, t, guidance, crop) of (seed, iteration, purpose, global sample index).
Resume, another number of ranks and another split into micro-batches therefore give the same numbers
by construction. All draws are made on the CPU, so that they do not depend on the device either;
nor on when they are made, so that a thread may make them before they are asked for
(`senseflow.distill.foresight`).

torch's CPU generator keeps the low 32 bits of its seed: among n streams two coincide with a chance
of about n^2 / 2^33 (2e-4 for the thousand streams of one large iteration), which no mean notices.
"""

import json
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal, NamedTuple

import torch
from torch import Tensor


def seed_of(seed: int, iteration: int, purpose: str, index: int | None = None) -> int:
    """The 64-bit seed of one stream of draws.

    `index` is the global sample index, or None for a draw that all samples and ranks share. Any
    change of any argument gives an unrelated seed.
    """
    # JSON keeps the parts apart: (1, 12) and (11, 2) must not be one stream.
    name = json.dumps([seed, iteration, purpose, index])
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "big")


class Stream(NamedTuple):
    """What is asked of the stream of one purpose: a tensor per sample."""

    purpose: str
    law: Literal["normal", "uniform"]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Draws:
    """The draws of one iteration for the samples whose global indices are `indices`."""

    seed: int
    iteration: int
    indices: tuple[int, ...]

    def shared(self, purpose: str) -> torch.Generator:
        """A fresh CPU generator at the start of the stream all ranks and micro-batches share."""
        return _generator(seed_of(self.seed, self.iteration, purpose))

    def normal(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        """Unit Gaussian noise (b, *shape), float32 on the CPU; row i is of sample `indices[i]`."""
        return self.draw(Stream(purpose, "normal", tuple(shape)))

    def uniform(self, purpose: str, num: int = 1) -> Tensor:
        """Uniform in [0, 1), (b, num), float32 on the CPU; row i is of sample `indices[i]`."""
        return self.draw(Stream(purpose, "uniform", (num,)))

    def draw(self, stream: Stream) -> Tensor:
        """(b, *shape), float32 on the CPU; row i is of sample `indices[i]`."""
        rows = torch.empty(len(self.indices), *stream.shape)
        for row, index in zip(rows, self.indices, strict=True):
            # A generator per sample: its noise knows nothing of the others in the batch.
            generator = _generator(seed_of(self.seed, self.iteration, stream.purpose, index))
            if stream.law == "normal":
                row.normal_(generator=generator)
            else:
                row.uniform_(generator=generator)
        return rows


def _generator(seed: int) -> torch.Generator:
    # A device's generator is another algorithm: the same seed would give other noise there.
    return torch.Generator(device="cpu").manual_seed(seed)
