"""What a run folder says of a run, read without torch: rows, configuration, starts, state.

A run may still be training while it is read, and may have been killed at any moment: what is half
written or missing is a notice, not an error.
"""

import re
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from senseflow.common.files import parse_json
from senseflow.config.yaml_text import read_yaml
from senseflow.report.signals import Facts

STRIP = re.compile(r"step_(\d+)\.png")
EVENTS = re.compile(r"events\.out\.tfevents\.(\d+)\..*")
LONGEST_PAUSE_S = 900.0  # a save of 12 B networks on a slow disk, between two rows
UNITS_S = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))
PATIENCE = 5.0  # log intervals without a row before a run counts as not running

Row = dict[str, float]
Tree = dict[str, Any]


@dataclass(frozen=True)
class State:
    """finished, going or stopped, and since when."""

    name: str
    words: str


@dataclass(frozen=True)
class RunFolder:
    """One run; `notices` says what could not be read."""

    folder: Path
    rows: list[Row]
    config: Tree
    starts: list[tuple[float, int | None]]  # Unix time, and the first iteration
    saved: int | None  # iteration of the newest checkpoint
    changed_at: float | None  # Unix time of the last row or strip
    strips: list[tuple[int, Path]]
    num_unreadable: int  # files of the data set
    notices: list[str] = field(default_factory=list)

    @property
    def done(self) -> int:
        """Iterations done, as far as the folder tells."""
        last = int(self.rows[-1]["iteration"]) if self.rows else 0
        return max(last, self.saved or 0)

    @property
    def planned(self) -> int | None:
        """The iterations that the run is to have, train.iter_num; None where no number is known."""
        value = self.setting("train", "iter_num")
        return value if isinstance(value, int) else None

    @property
    def training_s(self) -> float:
        """Seconds of the iterations in the rows; saves, start-up and lost work not counted."""
        seconds, before = 0.0, 0.0
        for row in self.rows:
            seconds += row.get("time_s/iteration", 0.0) * max(0.0, row["iteration"] - before)
            before = row["iteration"]
        return seconds

    @property
    def resumed(self) -> tuple[int, ...]:
        """The first iteration of each start but the first; in runs of before, its first row."""
        firsts = [first for _, first in self.starts if first is not None]
        begin = int(self.rows[0]["iteration"]) if self.rows else 0
        return tuple(sorted({first for first in firsts if first > begin}))

    def setting(self, section: str, key: str) -> Any:
        """A value of config.yaml; None where it does not say."""
        tree = self.config.get(section)
        return tree.get(key) if isinstance(tree, dict) else None

    def facts(self) -> Facts:
        """What the rules about curves need to know."""
        limit = self.setting("optimizer", "max_grad_norm")
        return Facts(
            max_grad_norm=float(limit) if isinstance(limit, int | float) else None,
            ida=self.setting("ida", "lam") is not None,
            adversary=str(self.setting("adversarial", "kind")),
            resumed=self.resumed,
        )

    def state(self, now: float) -> State:
        """Nothing in a run folder says that a process is alive: the age of the last row has to."""
        if self.planned is not None and self.done >= self.planned:
            return State("finished", f"all {counted(self.planned, 'iteration')} done")
        of = f" of {self.planned}" if self.planned is not None else ""
        if self.changed_at is None:
            return State("not begun", f"no row and no strip yet{of and ','}{of} iterations")
        age, pause = now - self.changed_at, self._pause_s()
        ago = f"the last row or strip was written {duration(age)} ago"
        if age < pause:
            return State("still going", f"iteration {self.done}{of}; {ago}")
        return State("stopped", f"at iteration {self.done}{of}; {ago}")

    def _pause_s(self) -> float:
        """How long a run that goes on may be silent."""
        interval = self.setting("train", "log_interval")
        times = [row["time_s/iteration"] for row in self.rows[-5:] if "time_s/iteration" in row]
        if not isinstance(interval, int) or not times:
            return LONGEST_PAUSE_S
        return max(LONGEST_PAUSE_S, PATIENCE * interval * max(times))


def read_run(folder: Path) -> RunFolder:
    """Read a run folder; raises ValueError for a folder that is none."""
    if folder.is_file():
        raise ValueError(f"{folder} is a file: name its run folder, such as {folder.parent}")
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a run folder: there is no such folder")
    if not any((folder / name).exists() for name in ("config.yaml", "stats.jsonl")):
        raise ValueError(
            f"{folder} is not a run folder: neither config.yaml nor stats.jsonl is in it; "
            "name the SAVE_DIR of a training script"
        )
    rows, notices = read_rows(folder / "stats.jsonl")
    config, said = read_config(folder / "config.yaml")
    found = [(m, p) for p in (folder / "samples").glob("*.png") if (m := STRIP.fullmatch(p.name))]
    strips = sorted((int(match[1]), path) for match, path in found)
    touched = [folder / "stats.jsonl", *(path for _, path in strips)]
    unreadable = folder / "unreadable.txt"
    return RunFolder(
        folder=folder,
        rows=rows,
        config=config,
        starts=read_starts(folder / "tensorboard"),
        saved=_saved(folder / "last_iter"),
        changed_at=max((p.stat().st_mtime for p in touched if p.exists()), default=None),
        strips=strips,
        num_unreadable=len(_text(unreadable).splitlines()) if unreadable.is_file() else 0,
        notices=[*said, *notices],
    )


def read_rows(file: Path) -> tuple[list[Row], list[str]]:
    """The rows of stats.jsonl by iteration, and notices of those that cannot be read."""
    if not file.is_file():
        return [], ["There is no stats.jsonl: nothing was measured yet, or it was removed."]
    lines = [line for line in _text(file).splitlines() if line.strip()]
    parsed = [_row(line) for line in lines]
    bad = [number for number, row in enumerate(parsed, 1) if row is None]
    notices = []
    if not lines:
        notices.append("stats.jsonl is empty: the first log interval is not over yet.")
    if bad and bad[-1] == len(lines):
        notices.append("The last row of stats.jsonl is half written: it is left out.")
        bad.pop()
    if bad:
        where = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
        unread = counted(len(bad), "row")
        notices.append(f"{unread} of stats.jsonl cannot be read and left out: {where}.")
    rows = [row for row in parsed if row is not None]
    newest = {row["iteration"]: row for row in rows}  # a later row replaces an earlier one
    if len(newest) < len(rows):
        again = counted(len(rows) - len(newest), "row")
        notices.append(f"stats.jsonl has {again} of iterations it has already: the later is shown.")
    return [newest[iteration] for iteration in sorted(newest)], notices


def _row(line: str) -> Row | None:
    """One row; None when it is not a JSON object of numbers with an iteration."""
    try:
        row = parse_json(line, "a row")
    except ValueError:
        return None
    if not isinstance(row, dict) or "iteration" not in row:
        return None
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in row.values())
    if not numbers or not abs(row["iteration"]) < 2**53:
        return None
    return {key: float(value) for key, value in row.items()}


def read_config(file: Path) -> tuple[Tree, list[str]]:
    """The tree in config.yaml, and notices when there is none."""
    if not file.is_file():
        return {}, ["There is no config.yaml: recipe, teacher and length are not known."]
    try:
        tree = read_yaml(file)
    except ValueError:
        return {}, ["config.yaml is not valid YAML: recipe, teacher and length are not known."]
    if not isinstance(tree, dict):
        return {}, ["config.yaml holds no sections: recipe, teacher and length are not known."]
    return tree, []


def read_starts(folder: Path) -> list[tuple[float, int | None]]:
    """When the run was started, and the first iteration of each start, from TensorBoard's files.

    [] for a run without them (log.tensorboard: false).
    """
    starts = []
    for file in sorted(folder.glob("events.out.tfevents.*")):
        match = EVENTS.fullmatch(file.name)
        if match and file.is_file():
            steps = (event.step for event in EventFileLoader(str(file)).Load() if event.step > 0)
            starts.append((float(match[1]), next(steps, None)))
    return sorted(starts, key=lambda start: start[0])


def counted(num: int, noun: str) -> str:
    """Such as "1 row" or "2 rows"."""
    return f"{num} {noun}{'' if num == 1 else 's'}"


def duration(seconds: float) -> str:
    """Seconds in two units at most, such as "3 h 12 min"."""
    whole = max(0, round(seconds))
    for (size, name), (small, smaller) in pairwise(UNITS_S):
        if whole >= size:
            rest = whole % size // small
            return f"{whole // size} {name}" + (f" {rest} {smaller}" if rest else "")
    return f"{whole} s"


def date(unix_s: float) -> str:
    """Such as "2026-11-21 17:05 UTC"."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(unix_s))


def _saved(file: Path) -> int | None:
    text = _text(file).strip() if file.is_file() else ""
    return int(text) if text.isdigit() else None


def _text(file: Path) -> str:
    """A text file; what is not UTF-8 in it is replaced, and found again by who parses it."""
    return file.read_text(encoding="utf-8", errors="replace")
