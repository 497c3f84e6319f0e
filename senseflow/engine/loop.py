"""The training loop: iterations, measures, strips, checkpoints, and how a run stops."""

import logging
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from senseflow.core.ida import squared_gap
from senseflow.data.items import Unreadable
from senseflow.data.sampler import Batch
from senseflow.distill import train_iteration
from senseflow.engine.checkpoint import Checkpoints, step_name
from senseflow.engine.config import Config, differences, load_config, save_config
from senseflow.engine.measures import STOPWATCH, Log, Measures, image_drift
from senseflow.engine.optim import Trained, lr_factor
from senseflow.engine.parallel import Ranks, local_shards, sum_over_ranks
from senseflow.engine.strips import labelled_grid
from senseflow.pictures import save_whole
from senseflow.state import Distillation, first_samples, real_images

logger = logging.getLogger(__name__)

Data = Callable[[int], Iterator[list[Batch]]]  # from this iteration on
Export = Callable[[int, Path], None]  # writes the student of an iteration to a folder


class NonFiniteError(RuntimeError):
    """A loss or gradient norm was not finite; the step it belongs to changed nothing."""


class Agreement:
    """What all ranks must know of each other: a stop request, and the files they could not read.

    SIGINT and SIGTERM ask the run to save and stop. The numbers are summed over ranks on the host
    while the next iteration computes, so nothing waits for a device; ranks learn them one iteration
    later, all in the same one.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.received = False
        self.sums = torch.zeros(2)
        self.pending: dist.Work | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True

    def reach(self, num_unreadable: int) -> tuple[bool, int]:
        """Whether any rank asks to stop, and unreadable files in all; once per iteration."""
        mine = torch.tensor([float(self.received), float(num_unreadable)])
        if self.ranks.world_size == 1:
            self.sums = mine
        elif self.pending:
            self.pending.wait()
        stop, unreadable = self.sums.tolist()
        if self.ranks.world_size > 1:
            self.sums = mine
            self.pending = dist.all_reduce(self.sums, async_op=True)
        return stop > 0, int(unreadable)


@dataclass
class Run:
    """One run folder and everything that fills it."""

    config: Config
    parts: Distillation
    ranks: Ranks
    data: Data
    export: Export
    folder: Path
    measures: Measures = field(default_factory=Measures)

    def __post_init__(self) -> None:
        self.trained: dict[str, Trained] = {
            "generator": self.parts.generator,
            "fake_score": self.parts.fake_score,
        }
        if self.parts.discriminator:
            self.trained["discriminator"] = self.parts.discriminator.heads
        self.checkpoints = Checkpoints(self.folder, self.config.train.keep_last, self.ranks)
        self.unreadable = Unreadable(
            self.folder / "unreadable.txt", self.config.data.max_unreadable
        )

    def train(self, done: int) -> None:
        """From the iteration after `done` to the last one, or to a stop request."""
        config, agreement = self.config.train, Agreement(self.ranks)
        log = Log(self.folder, self.config.log.tensorboard) if self.ranks.is_main else None
        if log:
            log.rewind(done)
        data = self.data(done + 1)
        bar = tqdm(initial=done, total=config.iter_num, disable=not self.ranks.is_main, unit="it")
        strip_due = False
        began, since = time.perf_counter(), done
        for iteration in range(done + 1, config.iter_num + 1):
            pictures, batch = self.iterate(data, iteration)
            strip_due |= is_due(iteration, self.config.log.sample_interval)
            if strip_due and {"teacher x0", "ISG target"} & pictures.keys():
                self.show(iteration, pictures, batch)
                strip_due = False
            mine = len(self.unreadable.seen) - (0 if self.ranks.is_main else self.unreadable.known)
            stop, num_unreadable = agreement.reach(mine)
            self.unreadable.check(num_unreadable)
            last = stop or iteration == config.iter_num
            save = last or is_due(iteration, config.save_interval)
            if save or is_due(iteration, config.log_interval):
                seconds = (time.perf_counter() - began) / (iteration - since)
                self.report(log, bar, iteration, since, seconds)
                since = iteration
            bar.update()
            if save:
                self.save(iteration)
            if since == iteration:
                began = time.perf_counter()
            if last:
                break
        bar.close()
        if log:
            log.close()

    def iterate(
        self, data: Iterator[list[Batch]], iteration: int
    ) -> tuple[dict[str, Tensor], Batch]:
        """One iteration; returns the latents it computed and its first batch, for the strip."""
        with STOPWATCH.measure("data"):
            batches = next(data)
        self.unreadable.note([bad for batch in batches for bad in batch.unreadable])
        factor = lr_factor(iteration, self.config.train.iter_num, self.config.lr_scheduler)
        for trained in self.trained.values():
            trained.set_lr(factor)
        pictures = train_iteration(self.parts, batches, iteration, self.measures)
        return pictures, batches[0]

    def report(
        self, log: Log | None, bar: tqdm, iteration: int, since: int, seconds: float
    ) -> None:
        """Read the measures (here alone the loop waits for the device), check them, write a row."""
        phases = STOPWATCH.read()
        values = self.measures.read(self.ranks)
        bad = [name for name, value in values.items() if value - value != 0]
        if bad:
            raise NonFiniteError(
                f"{', '.join(bad)} not finite in iterations {since + 1} to {iteration}; no "
                f"step was taken from it. The newest checkpoint in {self.checkpoints.folder} is "
                "good: lower the learning rate or find the bad input, then run the command again"
            )
        values["ida/gap"] = self.gap()
        values |= {
            f"lr/{name}": t.optimizer.param_groups[0]["lr"] for name, t in self.trained.items()
        }
        values["time_s/iteration"] = seconds
        values |= {f"time_s/{name}": s / (iteration - since) for name, s in phases.items()}
        if self.ranks.device.type == "cuda":
            values["mem_gib"] = torch.cuda.max_memory_allocated() / 2**30
        if log:
            log.write(iteration, values)
            shown = ("loss/dmd", "loss/isg", "loss/fake", "discriminator/margin", "ida/gap")
            bar.set_postfix({n.split("/")[1]: f"{values[n]:.3g}" for n in shown if n in values})

    def gap(self) -> float:
        """||phi - theta|| / ||theta|| over all parameters and ranks."""
        networks = (self.parts.fake_score.network, self.parts.generator.network)
        gap, size = sum_over_ranks(
            torch.stack(squared_gap(*map(local_shards, networks))), self.ranks
        ).tolist()
        return float((gap / size) ** 0.5)

    def show(self, iteration: int, pictures: dict[str, Tensor], batch: Batch) -> None:
        """Write the image strip of this iteration; measure drift if the discriminator did not."""
        num, decode = self.config.log.num_pictures, self.parts.adapter.decode
        measured = self.parts.discriminator is not None and self.parts.discriminator.sees_images
        with torch.no_grad():
            real = real_images(self.parts, first_samples(self.parts, batch, num))
            if not measured:
                generated = decode(pictures["generated"][:num])
                self.measures.add(image_drift(generated, real))
            if self.ranks.is_main:
                columns = {name: decode(latents[:num]) for name, latents in pictures.items()}
                file = self.folder / "samples" / f"{step_name(iteration)}.png"
                save_whole(labelled_grid({**columns, "real": real}), file)

    def save(self, iteration: int) -> None:
        """The checkpoint first: where time is short, it is what must not be lost."""
        self.checkpoints.save(iteration, self.trained)
        self.export(iteration, self.folder / "student" / step_name(iteration))

    def resume(self) -> int:
        """Load the newest good checkpoint, if there is one; returns the iterations done."""
        found = self.checkpoints.newest()
        if found:
            self.checkpoints.load(found[1], self.trained)
        if self.ranks.is_main:  # not before the checkpoint fits
            open_run_folder(self.folder, self.config)
        if found is None:
            return 0
        iteration, folder = found
        if self.ranks.is_main:
            logger.info("going on from %s", folder)
        student = self.folder / "student" / step_name(iteration)
        if not student.exists():  # the run ended between the two
            self.export(iteration, student)
        return iteration


def open_run_folder(folder: Path, config: Config) -> None:
    """Create the folder and save the resolved config; says what differs from an earlier one."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "config.yaml"
    if file.exists():
        try:
            changed = differences(load_config(file), config)
        except ValueError as error:
            changed = [f"{error}; not compared"]
        if changed:
            logger.warning("going on with a changed configuration: %s", "; ".join(changed))
    save_config(config, file)


def is_due(iteration: int, interval: int) -> bool:
    """Every `interval` iterations; 0 is never."""
    return interval > 0 and iteration % interval == 0
