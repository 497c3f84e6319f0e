"""What a run reports: detached 0-d tensors gathered without waiting, read once per log interval."""

import json
import threading
from pathlib import Path

from senseflow.common.files import write_whole
from senseflow.engine.disk import writing


class Log:
    """stats.jsonl and TensorBoard of a run folder; one row per log interval."""

    def __init__(self, folder: Path, tensorboard: bool) -> None:
        self.file = folder / "stats.jsonl"
        self.events = folder / "tensorboard"
        self.writer = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # that of rank 0 alone

            with writing(self.events):
                self.writer = SummaryWriter(str(self.events))
        # TensorBoard writes in a thread of its own, whose errors would be said twice.
        threading.excepthook = _unless_disk

    def rewind(self, iteration: int) -> None:
        """Drop rows later than `iteration`: a resumed run writes them again."""
        if not self.file.exists():
            return
        rows = self.file.read_text().splitlines()
        kept = [row for row in rows if _iteration_of(row) <= iteration]
        with writing(self.file):
            write_whole(self.file, "".join(row + "\n" for row in kept))

    def write(self, iteration: int, values: dict[str, float]) -> None:
        """Append to stats.jsonl and to the TensorBoard events; raises OSError naming the file."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with writing(self.file), self.file.open("a") as stream:
            stream.write(json.dumps({"iteration": iteration, **values}) + "\n")
        if self.writer:
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
        return float(json.loads(row)["iteration"])
    except (ValueError, KeyError):
        return float("inf")  # a row cut short by a crash
