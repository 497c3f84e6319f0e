"""Image strips, written by a thread: waiting for the device and compressing is not the loop's."""

import logging
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from senseflow.common.devices import one_thread
from senseflow.common.pictures import labelled_grid, save_whole
from senseflow.engine.disk import writing

logger = logging.getLogger(__name__)


class Strips:
    """One strip at a time is on its way to the disk; as a context manager it waits for the last.

    device: where the pictures are. A strip that cannot be written raises its OSError from `write`,
    `check` or the end of the context, whichever comes first.
    """

    def __init__(self, device: torch.device) -> None:
        self.pool = one_thread("strips", device)
        self.pending: Future[None] | None = None

    def __enter__(self) -> "Strips":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._wait()
        except OSError as failure:
            if error is None:
                raise
            logger.error("%s", failure)

    def write(self, file: Path, columns: dict[str, Tensor]) -> None:
        """Begin to write the columns (B, 3, H, W) in [-1, 1] as one PNG; they are not changed."""
        self._wait()
        self.pending = self.pool.submit(_write, file, columns)

    def check(self) -> None:
        """Raise what a strip that is through failed of; does not wait."""
        if self.pending and self.pending.done():
            self._wait()

    def _wait(self) -> None:
        pending, self.pending = self.pending, None
        if pending:
            pending.result()


def _write(file: Path, columns: dict[str, Tensor]) -> None:
    with writing(file):
        save_whole(labelled_grid(columns), file)
