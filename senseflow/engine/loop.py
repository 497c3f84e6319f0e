"""The training loop: iterations, measures, strips, checkpoints, and how a run stops."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from senseflow.common.files import write_whole
from senseflow.common.ranks import AgreedError, Ranks, any_rank, sum_over_ranks
from senseflow.common.signals import StopRequest
from senseflow.config.config import Config, differences, load_config, save_config
from senseflow.core.ida import squared_gap
from senseflow.data.items import Unreadable
from senseflow.data.sampler import Batch
from senseflow.distill.algorithm import draw_turn, train_iteration
from senseflow.distill.measures import STOPWATCH, Measures, image_drift
from senseflow.distill.rewards import RewardError
from senseflow.distill.state import Distillation, first_samples, real_images
from senseflow.engine.agreement import Agreement, require_equal
from senseflow.engine.checkpoint import Checkpoints, State, full_state, students
from senseflow.engine.checkpoint_folders import read_manifest, step_name
from senseflow.engine.disk import remove_partials, writing
from senseflow.engine.export import StudentExport, export_student
from senseflow.engine.log import Log
from senseflow.engine.skips import Skips, in_words
from senseflow.engine.strips import Strips
from senseflow.optim.resharding import reshard
from senseflow.optim.stretches import local_shards
from senseflow.optim.trained import Trained, lr_factor

logger = logging.getLogger(__name__)

Data = Callable[[int], Iterator[list[Batch]]]  # from this iteration on


class NonFiniteError(AgreedError):
    """A network's steps were not finite too often in a row; each of them changed nothing."""


@dataclass
class Run:
    """One run folder and everything that fills it."""

    config: Config
    parts: Distillation
    ranks: Ranks
    data: Data
    export: StudentExport
    folder: Path
    measures: Measures = field(default_factory=Measures)

    def __post_init__(self) -> None:
        self.trained: dict[str, Trained] = {
            "generator": self.parts.generator,
            "fake_score": self.parts.fake_score,
        }
        if self.parts.discriminator:
            self.trained["discriminator"] = self.parts.discriminator.heads
        train = self.config.train
        self.checkpoints = Checkpoints(self.folder, train.keep_last, self.ranks, train.async_save)
        self.strips = Strips(self.ranks.device)
        self.unreadable = Unreadable(
            self.folder / "unreadable.txt", self.config.data.max_unreadable
        )
        self.skips = Skips(train.max_skipped)
        self.saved = 0  # the newest iteration that is

    def train(self, done: int, stop: StopRequest, show: bool = True) -> None:
        """From the iteration after `done` to the last one, or to a stop request on any rank.

        show: a progress bar.
        """
        config, agreement = self.config.train, Agreement(self.ranks, stop)
        first = [draw_turn(self.parts, done + i) for i in range(1, 1 + agreement.AHEAD)]
        # A network file system may show one rank an older state than the others.
        require_equal({"iterations done": done, "the first turns": first})
        self.skips.good = self.saved = done
        if any_rank(stop.reason is not None, self.ranks):
            logger.info("asked to stop before anything was trained")
            return
        if done >= config.iter_num:
            logger.info(
                "nothing is left to train: %d of train.iter_num %d iterations are done; %s",
                *(done, config.iter_num, self._student(done)),
            )
            return
        log = Log(self.folder, self.config.log.tensorboard, done) if self.ranks.is_main else None
        logger.info(
            "iteration %d of %d follows, %.0f s after the start",
            *(done + 1, config.iter_num, time.monotonic() - stop.started),
        )
        data = self.data(done + 1)
        strip_due = stopped = False
        began, since = time.perf_counter(), done
        num, silent = config.iter_num, not (show and self.ranks.is_main)
        with tqdm(initial=done, total=num, disable=silent, unit="it") as bar, self.strips:
            for iteration in range(done + 1, config.iter_num + 1):
                pictures, batch = self.iterate(data, iteration)
                strip_due |= is_due(iteration, self.config.log.sample_interval)
                # Due in any iteration, shown on theta's turn: only there is all of it computed.
                if strip_due and draw_turn(self.parts, iteration).generator:
                    self.show(iteration, pictures, batch)
                    strip_due = False
                self.strips.check()
                stopped = self.agree(agreement, iteration)
                last = stopped or iteration == config.iter_num
                save = last or is_due(iteration, config.save_interval)
                if save or is_due(iteration, config.log_interval):
                    seconds = (time.perf_counter() - began) / (iteration - since)
                    self.report(log, bar, iteration, since, seconds)
                    since = iteration
                bar.update()
                if save:
                    self.save(iteration)
                stop.lead_s = self.checkpoints.seconds
                if since == iteration:  # after the save, whose time is no iteration's
                    began = time.perf_counter()
                if last:
                    break
        self.checkpoints.wait()
        if stopped:
            reason = stop.reason or "a request to another rank"
            logger.info("stopped by %s; iteration %d is saved", reason, iteration)
        else:
            said = f"iteration {iteration} of {config.iter_num} is done"
            logger.info("%s; %s", said, self._student(iteration))
        if log:
            log.close()

    def _student(self, iteration: int) -> str:
        return f"the student is {self.folder / 'student' / step_name(iteration)}"

    def iterate(
        self, data: Iterator[list[Batch]], iteration: int
    ) -> tuple[dict[str, Tensor], Batch]:
        """One iteration; returns the latents it computed and its first batch, for the strip."""
        with STOPWATCH.measure("data"):
            batches = next(data)
        self.unreadable.note([bad for batch in batches for bad in batch.unreadable])
        # By the loop's iterations for all three: theta's own steps are N times as rare.
        factor = lr_factor(iteration, self.config.train.iter_num, self.config.lr_scheduler)
        for trained in self.trained.values():
            trained.set_lr(factor)
        try:
            pictures = train_iteration(self.parts, batches, iteration, self.measures)
        except RewardError as error:
            self.save_before(iteration)
            raise RewardError(
                f"{error}, in iteration {iteration}; what was trained before it is saved"
            ) from error
        return pictures, batches[0]

    def agree(self, agreement: Agreement, iteration: int) -> bool:
        """Whether any rank asks to stop; checks what all ranks found unreadable, and what they draw
        next."""
        known = 0 if self.ranks.is_main else self.unreadable.known
        mine = len(self.unreadable.seen) - known
        ahead = draw_turn(self.parts, iteration + agreement.AHEAD)
        stopped, num_unreadable = agreement.reach(mine, ahead)
        self.check_unreadable(num_unreadable)
        return stopped

    def check_unreadable(self, num: int) -> None:
        """Stop the run past the limit: of `num` files, counted by every rank that met them, or
        where that is too many, by their names."""
        if num > self.unreadable.limit:
            everyone: list[Any] = [None] * self.ranks.world_size
            dist.all_gather_object(everyone, self.unreadable.seen)
            self.unreadable.know(set().union(*everyone))
            self.unreadable.check(len(self.unreadable.seen))

    def report(
        self, log: Log | None, bar: tqdm, iteration: int, since: int, seconds: float
    ) -> None:
        """Read the measures (here alone the loop waits for the device), write a row, and say which
        steps were skipped; too many in a row end the run."""
        phases = STOPWATCH.read()
        read = self.measures.read(self.ranks)
        skipped = self.skips.note(self.measures.steps)
        values = {name: value for name, value in read.items() if math.isfinite(value)}
        values |= {f"skipped/{name}": float(len(which)) for name, which in skipped.items()}
        if self.parts.retry:
            values["skipped/stops"] = float(self.parts.retry)
        if (gap := self.gap()) is not None:
            values["ida/gap"] = gap
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
        if bad := [name for name in read if name not in values]:
            self.not_finite(
                f"{', '.join(bad)} not finite in iterations {since + 1} to {iteration}; steps "
                f"skipped: {in_words(skipped)}"
            )

    def not_finite(self, what: str) -> None:
        """Say what happened, and go on or save and stop."""
        limit = self.config.train.max_skipped
        if not self.skips.too_many:
            if self.ranks.is_main:
                logger.warning(
                    "%s. The run goes on: up to %d in a row of one network (train.max_skipped)",
                    *(what, limit),
                )
            return
        # From before the steps that changed nothing, which are made again with other draws.
        self.skips.in_a_row.clear()
        self.parts = replace(self.parts, retry=self.parts.retry + 1)
        self.save(self.skips.good)
        self.checkpoints.wait()
        rates = self.config.optimizer
        raise NonFiniteError(
            f"{what}, more than train.max_skipped {limit} in a row. "
            f"Iteration {self.skips.good} is saved in {self.checkpoints.folder}, without them: "
            "the same command goes on from there and draws anew. If that ends alike: lower the "
            f"learning rates (optimizer.lr {rates.lr:g}, fake_score_lr {rates.fake_score_lr:g}, "
            f"discriminator_lr {rates.discriminator_lr:g}) or go back to an older checkpoint"
        )

    def save_before(self, iteration: int) -> None:
        """Save what an iteration that moved nothing began with, unless it is the run's start or
        saved already."""
        if iteration - 1 > self.saved:
            self.save(iteration - 1)
        self.checkpoints.wait()

    def gap(self) -> float | None:
        """||phi - theta|| / ||theta|| over all parameters and ranks; None while a generator that is
        an adapter has not moved from zero."""
        roles = (self.parts.fake_score, self.parts.generator)
        for role in roles:
            reshard(role.network)
        phi, theta = (local_shards(role.network.parameters()) for role in roles)
        # Replicas (HSDP) count every square alike often, in both sums.
        gap, size = sum_over_ranks(torch.stack(squared_gap(phi, theta)), self.ranks).tolist()
        return float((gap / size) ** 0.5) if size > 0 else None

    def show(self, iteration: int, pictures: dict[str, Tensor], batch: Batch) -> None:
        """Decode the image strip of this iteration, which a thread writes; measure drift if there
        are real images and the discriminator did not."""
        num, decode = self.config.log.num_pictures, self.parts.adapter.decode
        measured = self.parts.discriminator is not None and self.parts.discriminator.sees_images
        with torch.no_grad():
            # On every rank: where drift is measured here, it is a mean over all.
            real: dict[str, Tensor] = {}
            if batch.has_images:
                real["real"] = real_images(self.parts, first_samples(self.parts, batch, num))
                if not measured:
                    generated = decode(pictures["generated"][:num])
                    self.measures.add(image_drift(generated, real["real"]))
            if self.ranks.is_main:
                # Rank 0 alone: the VAE is not sharded, so no other rank has to decode with it.
                columns = {name: decode(latents[:num]) for name, latents in pictures.items()}
                file = self.folder / "samples" / f"{step_name(iteration)}.png"
                self.strips.write(file, {**columns, **real})

    def save(self, iteration: int) -> None:
        """The checkpoint first: where time is short, it is what must not be lost."""
        self.skips.good = self.saved = iteration
        facts = {"skipped": dict(self.skips.in_a_row), "retry": self.parts.retry}
        self.checkpoints.save(
            iteration, self.trained, self.parts.ema, partial(self.after_save, iteration), facts
        )

    def after_save(self, iteration: int, state: State) -> None:
        """What stands beside a checkpoint: its configuration and its student."""
        self.checkpoints.host.on_main(lambda: keep_config(self.folder, self.config))
        self.write_students(iteration, state, again=True)

    def write_students(self, iteration: int, state: State, again: bool) -> None:
        """Write the student of an iteration and its EMA; `again` also where they are already."""
        host = self.checkpoints.host
        for kind, tensors in students(state).items():
            folder = self.folder / kind / step_name(iteration)
            if again or not host.on_main(folder.is_dir):
                decay = self.config.ema.decay if kind == "ema" else None
                describe = self.export.describe(iteration, decay)
                export_student(tensors, self.export.layout, folder, host, describe)

    def resume(self) -> int:
        """Load the newest good checkpoint, if there is one; returns the iterations done."""
        ema, host = self.parts.ema, self.checkpoints.host
        found = self.checkpoints.newest()
        if found:
            self.checkpoints.load(found[1], self.trained, ema)
            facts = host.on_main(partial(read_manifest, found[1]))
            self.skips.in_a_row = facts["skipped"]
            self.parts = replace(self.parts, retry=facts["retry"])
        done = found[0] if found else None
        host.on_main(lambda: open_run_folder(self.folder, self.config, done))  # the checkpoint fits
        if found is None:
            return 0
        iteration, folder = found
        logger.info("going on from %s, of %d iterations", folder, self.config.train.iter_num)
        # the run may have ended between the two
        self.write_students(iteration, full_state(self.trained, ema), again=False)
        return iteration


def open_run_folder(folder: Path, config: Config, done: int | None) -> None:
    """Save the resolved config, and forget what was reported of later iterations than `done` (None:
    there is no checkpoint); says what differs from before."""
    for kind in ("student", "ema"):
        remove_partials(folder / kind)
    for strip in (folder / "samples").glob("step_*.png"):
        if strip.stem > step_name(done or 0):
            strip.unlink()
    last = folder / "last_iter"
    with writing(last):
        if done is not None:
            write_whole(last, f"{done}\n")
        elif last.exists():
            logger.warning(
                "%s says %s, but there is no checkpoint: the run begins anew, and what it reported "
                "before goes",
                *(last, last.read_text().strip()[:20]),
            )
            last.unlink()
    file = folder / "config.yaml"
    if file.exists():
        try:
            changed = differences(load_config(file), config)
        except ValueError as error:
            changed = [f"{error}; not compared"]
        if changed:
            logger.warning("going on with a changed configuration: %s", "; ".join(changed))
    with writing(file):
        save_config(config, file)


def keep_config(folder: Path, config: Config) -> None:
    """Write config.yaml again when the run folder was removed under the run."""
    file = folder / "config.yaml"
    if not file.exists():
        with writing(file):
            save_config(config, file)


def is_due(iteration: int, interval: int) -> bool:
    """Every `interval` iterations; 0 is never."""
    return interval > 0 and iteration % interval == 0
