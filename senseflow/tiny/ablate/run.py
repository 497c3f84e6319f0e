"""Runs the trials of a study in worker processes, a thread each, and reports what they found."""

import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from senseflow.common.files import only_writer, require_writable, write_whole
from senseflow.common.pictures import save_whole
from senseflow.common.quiet import quiet_libraries
from senseflow.common.signals import StopRequest
from senseflow.config.recipes import RECIPES
from senseflow.config.strict_yaml import read_strictly
from senseflow.engine.build import check_networks
from senseflow.engine.inputs import read_run
from senseflow.tiny.ablate.findings import write_report
from senseflow.tiny.ablate.study import Place, Study, Trial, places_of, quick
from senseflow.tiny.ablate.trial import (
    STRIP,
    measure_teacher,
    ruler_for,
    run_trial,
    strip,
    teacher_rows,
)
from senseflow.tiny.pictures import write_dataset

NUM_DATA = 4000
WORKER = {"OMP_NUM_THREADS": "1"}


@dataclass
class Ablation:
    """A study in its output folder."""

    study: Study
    places: dict[Place, Trial]
    output: Path

    @classmethod
    def open(cls, file: Path, output: Path, is_quick: bool, tables: list[str] | None) -> "Ablation":
        """Read and check a study; raises ValueError before anything is trained."""
        study = read_strictly(Study, file)
        study = quick(study) if is_quick else study
        unknown = [name for name in tables or () if name not in study.tables]
        if unknown:
            known = ", ".join(study.tables)
            raise ValueError(f"--tables {unknown[0]}: {file} has {known}")
        require_writable("--output", output)
        places = places_of(study, is_quick)
        wanted = {p: t for p, t in places.items() if tables is None or p[0] in tables}
        return cls(study, wanted, output)

    def trials(self) -> list[Trial]:
        """Every trial once, those that others go on from first."""
        seen: dict[str, Trial] = {}
        for trial in self.places.values():
            for each in reversed(list(chain(trial))):
                seen.setdefault(each.name, each)
        return list(seen.values())

    def pending(self) -> list[Trial]:
        """Trials without a result, and those whose state a pending one goes on from."""
        pending: dict[str, Trial] = {}
        for trial in reversed(self.trials()):  # those that go on from others first
            needed = any(t.after and t.after.name == trial.name for t in pending.values())
            done = (trial.folder(self.output) / "result.json").is_file()
            if not done or (needed and not self.has_state(trial)):
                pending[trial.name] = trial
        return [trial for trial in self.trials() if trial.name in pending]

    def has_state(self, trial: Trial) -> bool:
        """Whether another can go on from it, or it diverged and none ever can."""
        folder = trial.folder(self.output)
        result = json.loads((folder / "result.json").read_text())
        return result["diverged"] is not None or (folder / "run" / "checkpoints").is_dir()

    def run(self, num_workers: int) -> None:
        """Everything that has no result yet; raises ValueError when a trial fails."""
        quiet_libraries()
        self.output.mkdir(parents=True, exist_ok=True)
        with only_writer(self.output):
            self.run_pending(num_workers)
            for trial in self.trials():  # nothing goes on from their training states any more
                shutil.rmtree(trial.folder(self.output) / "run" / "checkpoints", ignore_errors=True)

    def run_pending(self, num_workers: int) -> None:
        """Data, teachers and trials that are not there yet, with the output to itself."""
        began = time.monotonic()
        data = self.output / "data" / "data.json"
        if not data.is_file():
            write_dataset(data.parent, NUM_DATA, seed=0)
        for trial in self.one_each():
            config = trial.config(data)
            check_networks(read_run(config, RECIPES[config.recipe].family))
        pending = self.pending()
        done = len(self.trials()) - len(pending)
        os.environ.update(WORKER)  # the workers'
        try:
            with tqdm(total=done + len(pending), initial=done, unit="trial") as bar, as_interrupt():
                self.work(pending, num_workers, bar)
        finally:
            self.add_time(time.monotonic() - began)

    def work(self, pending: list[Trial], num_workers: int, bar: tqdm) -> None:
        """Trials in their order, each once what it goes on from is done."""
        waiting = list(pending)
        left = {trial.name for trial in pending}
        running: dict[Future[None], str] = {}
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(num_workers, context, start_worker) as pool:
            try:
                for trial in self.one_each():
                    if not teacher_rows(trial, self.output).is_file():
                        running[pool.submit(run_teacher, trial, self.output)] = trial.teacher
                while waiting or running:
                    for trial in [t for t in waiting if not (t.after and t.after.name in left)]:
                        if len(running) >= num_workers:
                            break
                        waiting.remove(trial)
                        running[pool.submit(run_one, trial, self.output)] = trial.name
                    finished, _ = wait(running, return_when=FIRST_COMPLETED)
                    for future in finished:
                        name = running.pop(future)
                        future.result()
                        bar.update(name in left)
                        left.discard(name)
            except BrokenProcessPool as error:
                raise ValueError(
                    "a worker was killed (often: out of memory); fewer --workers, or run again"
                ) from error
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for child in multiprocessing.active_children():
                    os.kill(child.pid or 0, signal.SIGTERM)  # saves, and stops
                raise

    def one_each(self) -> list[Trial]:
        """A trial of each teacher."""
        return [*{trial.teacher: trial for trial in self.trials()}.values()]

    def add_time(self, seconds: float) -> None:
        """Count the seconds this command has taken in all."""
        file = self.output / "time.json"
        before = json.loads(file.read_text())["wall_s"] if file.is_file() else 0.0
        write_whole(file, json.dumps({"wall_s": before + seconds}) + "\n")

    def report(self) -> None:
        """Write report.md, results.json, curves and pictures of what is done."""
        if not self.output.is_dir():
            raise ValueError(f"--output {self.output}: nothing there to report")
        write_report(self.study, self.places, self.output)


def chain(trial: Trial) -> Iterator[Trial]:
    """A trial, the one it goes on from, and so on."""
    yield trial
    if trial.after:
        yield from chain(trial.after)


@contextmanager
def as_interrupt() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


STOP: list[StopRequest] = []  # this worker's, made in its main thread


def start_worker() -> None:
    """One thread, no bars, and signals that save."""
    torch.set_num_threads(1)
    quiet_libraries()
    STOP.append(StopRequest())


def run_one(trial: Trial, output: Path) -> None:
    """In a worker; a trial that was stopped counts as an interrupt."""
    if not run_trial(trial, output, STOP[0]):
        raise KeyboardInterrupt


def run_teacher(trial: Trial, output: Path) -> None:
    """In a worker: what the trial's teacher measures by itself."""
    ruler = ruler_for(trial, output, trial.config(output / "data" / "data.json"))
    rows, file = measure_teacher(ruler), teacher_rows(trial, output)
    save_whole(strip(ruler, ruler.sampler.family.many_steps), file.with_name(STRIP))
    write_whole(file, json.dumps(rows, indent=1) + "\n")
