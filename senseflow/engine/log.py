"""What a run reports: detached 0-d tensors gathered without waiting, read once per log interval."""

import json
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from senseflow.common.files import parse_json, write_whole
from senseflow.engine.disk import writing

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class Log:
    """stats.jsonl and TensorBoard of a run folder; one row per log interval.

    done: the iterations the run goes on from: what an earlier start reported of later ones is
    dropped, because they are done again.
    """

    def __init__(self, folder: Path, tensorboard: bool, done: int = 0) -> None:
        self.file = folder / "stats.jsonl"
        self.events = folder / "tensorboard"
        self._rewind(done)
        self.writer = self._open_events(done) if tensorboard else None
        # TensorBoard writes in a thread of its own, whose errors would be said twice.
        threading.excepthook = _unless_disk

    def _rewind(self, done: int) -> None:
        if not self.file.exists():
            return
        rows = self.file.read_text().splitlines()
        kept = [row for row in rows if _iteration_of(row) <= done]
        with writing(self.file):
            write_whole(self.file, "".join(row + "\n" for row in kept))

    def _open_events(self, done: int) -> "SummaryWriter":
        from torch.utils.tensorboard import SummaryWriter  # that of rank 0 alone

        with writing(self.events):
            # Earlier files stay as they are: this tells their readers what of them counts no more.
            return SummaryWriter(str(self.events), purge_step=done + 1)

    def write(self, iteration: int, values: dict[str, float]) -> None:
        """Append to stats.jsonl and to the TensorBoard events; raises OSError naming the file."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with writing(self.file), self.file.open("a") as stream:
            stream.write(json.dumps({"iteration": iteration, **values}) + "\n")
        if self.writer:
            if not self.events.is_dir():  # removed under the run
                with suppress(OSError):  # it has no file to write to
                    self.writer.close()
                self.writer = self._open_events(iteration - 1)
            with writing(self.events):
                for name, value in values.items():
                    self.writer.add_scalar(name, value, iteration)

    def close(self) -> None:
        """Flush and close the events."""
        if self.writer:
            with writing(self.events):
                self.writer.flush()
                self.writer.close()


def _unless_disk(args: threading.ExceptHookArgs) -> None:
    """No traceback of a disk's error in TensorBoard's thread: it is raised by `Log` as well."""
    if not isinstance(args.exc_value, OSError):
        threading.__excepthook__(args)


def _iteration_of(row: str) -> float:
    try:
        return float(parse_json(row, "a row")["iteration"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a row cut short by a crash
