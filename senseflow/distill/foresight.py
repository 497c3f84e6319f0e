"""Random numbers made by a thread before an iteration asks for them.

Noise is drawn on the host: some 2 ms for a latent at 1024 px, several for each sample of an
iteration. While they are drawn nothing is launched, and a GPU that is through waits. Which will be
asked for is known: as for the last turn of the same kind. What was not foreseen is drawn when it is
asked for, and the numbers are the same either way (`senseflow.core.draws`).
"""

from collections.abc import Hashable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor

from senseflow.common.devices import one_thread
from senseflow.core.draws import Draws, Stream


@dataclass(frozen=True)
class Foreseen(Draws):
    """Draws of which a thread has made some, or is making them."""

    asked: dict[Stream, None] = field(default_factory=dict, compare=False)  # in this order
    coming: dict[Stream, Future[Tensor]] = field(default_factory=dict, compare=False)

    def draw(self, stream: Stream) -> Tensor:
        """As `Draws`; in pinned memory where a thread of a GPU's process has made it."""
        self.asked[stream] = None
        made = self.coming.pop(stream, None)
        return super().draw(stream) if made is None else made.result()


class Foresight:
    """What turns of each kind have asked for, and the thread, which ends with this object."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.pool = one_thread("draws", device)
        self.asked: dict[Hashable, dict[Stream, None]] = {}
        self.coming: dict[Draws, dict[Stream, Future[Tensor]]] = {}

    def draws(self, kind: Hashable, draws: Draws) -> Foreseen:
        """Draws of one micro-batch of a turn of this kind, those with it that were foreseen."""
        asked = self.asked.setdefault(kind, {})
        coming = self.coming.pop(draws, {})
        return Foreseen(**vars(draws), asked=asked, coming=coming)

    def prepare(self, kind: Hashable, iteration: int, every: Iterable[Draws]) -> None:
        """While an iteration begins: start on the draws of the next one, whose turn is of this
        kind, for each of its micro-batches."""
        # What an earlier turn did not ask for after all is nobody's.
        self.coming = {d: made for d, made in self.coming.items() if d.iteration >= iteration}
        asked = tuple(self.asked.get(kind, ()))
        for draws in every:
            self.coming[draws] = {s: self.pool.submit(self._make, draws, s) for s in asked}

    def _make(self, draws: Draws, stream: Stream) -> Tensor:
        made = draws.draw(stream)
        return made.pin_memory() if self.on_gpu else made
