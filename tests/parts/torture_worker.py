"""A Python for the shell scripts that runs a trainer as it is and lets a test look on.

`PYTHON=<what write_python makes> sh exp_*/train_*.sh ...` observes the ranks, by wrapping functions
in the launcher, whose forks they are; data loader workers run plainly. A rank tells in a small file
in which phase it is (see `Post`), and writes the samples it trains on as rows of JSON. It can
be asked to stand still where a phase begins, so that a kill meets a phase of microseconds.
"""

import json
import mmap
import os
import runpy
import struct
import sys
import time
import zlib
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

WATCHED = "SENSEFLOW_TEST_WATCHED"  # the folder of the ranks' files

LAUNCHER, LOADING, RESUME = "launcher", "loading networks", "resume"
DATA, GENERATE, GENERATOR, IDA = "data loading", "generation", "generator step", "IDA"
AFTER_IDA, FAKE = "between generator and fake score", "fake score step"
AFTER_FAKE, DISCRIMINATOR = "between fake score and discriminator", "discriminator step"
REPORT, SAVE, EXPORT, REST, END = "report", "saving", "exporting", "rest of the loop", "end"
PHASES = (
    *(LAUNCHER, LOADING, RESUME, DATA, GENERATE, GENERATOR, IDA, AFTER_IDA, FAKE),
    *(AFTER_FAKE, DISCRIMINATOR, REPORT, SAVE, EXPORT, REST, END),
)
HOLD_S = 60


class Post:
    """The file one rank and a test share: where the rank is, and where it shall stand still."""

    NUMBERS = ("phase", "hold", "hold_from", "pid", "resumed", "iteration", "saved")

    def __init__(self, folder: Path, rank: int) -> None:
        file = folder / f"rank_{rank}"
        if not file.exists():
            file.write_bytes(bytes(8 * len(self.NUMBERS)))
        with file.open("r+b") as stream:
            self.memory = mmap.mmap(stream.fileno(), 0)

    def __getitem__(self, name: str) -> int:
        return struct.unpack_from("q", self.memory, 8 * self.NUMBERS.index(name))[0]

    def __setitem__(self, name: str, value: int) -> None:
        struct.pack_into("q", self.memory, 8 * self.NUMBERS.index(name), value)

    @property
    def phase(self) -> str:
        return PHASES[self["phase"]]

    def enter(self, phase: str) -> None:
        """Tell the phase; stand still if that was asked for, to be killed."""
        self["phase"] = PHASES.index(phase)
        if self["hold"] == self["phase"] and self["iteration"] >= self["hold_from"]:
            time.sleep(HOLD_S)


def write_python(folder: Path, python: str = sys.executable) -> dict[str, str]:
    """A script for PYTHON, and the environment in which it writes its files to `folder`."""
    script = folder / "python"
    script.write_text(f'#!/bin/sh\nexec "{python}" "{__file__}" "$@"\n')
    script.chmod(0o755)
    return {"PYTHON": str(script), WATCHED: str(folder)}


def around(owner: Any, name: str, before: Callable[..., None], after: Callable[..., None]) -> None:
    """Call `before(*args)` ahead of `owner.name(*args)` and `after(result, *args)` behind it."""
    original = getattr(owner, name)

    @wraps(original)
    def watched(*args: Any, **kwargs: Any) -> Any:
        before(*args)
        result = original(*args, **kwargs)
        after(result, *args)
        return result

    setattr(owner, name, watched)


def watch(post: Post, samples: Path) -> None:
    """Wrap the functions that begin and end the phases."""
    from senseflow.distill import algorithm as distill
    from senseflow.distill import measures
    from senseflow.engine import build, checkpoint, loop

    def phase(name: str) -> Callable[..., None]:
        return lambda *ignored: post.enter(name)

    def note(batch: Any, iteration: int) -> None:
        with samples.open("a") as stream:
            stream.write(json.dumps(row(batch, iteration)) + "\n")

    def generate(d: Any, turn: Any, batch: Any, *more: Any) -> None:
        post.enter(GENERATE)
        note(batch, turn.iteration)

    def resumed(done: int, run: Any) -> None:
        post["resumed"] = post["iteration"] = done
        post.enter(REST)

    def iterate(run: Any, data: Any, iteration: int) -> None:
        post["iteration"] = iteration

    def saved(result: Any, checkpoints: Any, iteration: int, *more: Any) -> None:
        post["saved"] = iteration

    steps = {"generator": GENERATOR, "fake_score": FAKE, "discriminator": DISCRIMINATOR}

    def update(d: Any, turn: Any, trained: Any, name: str, *more: Any) -> None:
        post.enter(steps[name])

    def updated(result: Any, d: Any, turn: Any, trained: Any, name: str, *more: Any) -> None:
        if name == "fake_score":
            post.enter(AFTER_FAKE)

    def stopwatch(name: str) -> None:
        if name == "data":
            post.enter(DATA)

    def nothing(*ignored: Any) -> None:
        pass

    around(loop.Run, "resume", phase(RESUME), resumed)
    around(loop.Run, "train", nothing, phase(END))
    around(loop.Run, "iterate", iterate, phase(REST))
    around(measures.STOPWATCH, "measure", stopwatch, nothing)
    around(distill, "generate", generate, nothing)
    around(distill, "generator_backward", phase(GENERATOR), nothing)
    around(distill, "update", update, updated)
    around(distill, "align", phase(IDA), phase(AFTER_IDA))
    around(loop.Run, "report", phase(REPORT), phase(REST))
    around(loop.Run, "save", phase(SAVE), phase(REST))
    around(checkpoint.Checkpoints, "save", phase(SAVE), saved)
    exporter = loop if hasattr(loop, "export_student") else build
    around(exporter, "export_student", phase(EXPORT), phase(SAVE))


def row(batch: Any, iteration: int) -> dict[str, Any]:
    """Which samples a micro-batch holds: captions, digests of pictures, captions of real ones."""
    return {
        "iteration": iteration,
        "indices": batch.indices,
        "prompts": batch.prompts,
        "pictures": [zlib.crc32(image.numpy().tobytes()) for image in batch.images],
        "real": batch.real.prompts,
    }


def observe_ranks(folder: Path) -> None:
    """Wrap what a process of the run does first: it tells its number, and is observed."""
    from senseflow.launch import worker

    def begin(*ignored: Any) -> None:
        rank = os.environ["RANK"]
        post = Post(folder, int(rank))
        post["pid"] = os.getpid()
        watch(post, folder / f"samples_{rank}.jsonl")
        post.enter(LOADING)

    around(worker, "run_worker", begin, lambda *ignored: None)


def main() -> None:
    """Run `-m TRAINER ...`, its ranks observed; anything else as Python does."""
    arguments = [a for a in sys.argv[1:] if a != "-u"]
    if arguments[0] != "-m":
        os.execv(sys.executable, [sys.executable, *arguments])
    sys.path[0] = os.getcwd()
    observe_ranks(Path(os.environ[WATCHED]))
    sys.argv = arguments[1:]
    runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
