"""A student and its teacher in one pipeline, and how an image of either is drawn."""

import argparse
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from PIL import Image
from torch import nn

from senseflow.sampling.cli import build_parser, check_counts, check_finite
from senseflow.sampling.generate import Machine, Student, build, find_machine, find_network, prepare
from senseflow.sampling.planning import make_plan, trained_anchors
from senseflow.teachers.family import Family, Plan
from senseflow.weights.student import find_student

logger = logging.getLogger(__name__)

STUDENT, TEACHER = "student", "teacher"
MOST_STEPS = 1000  # the teachers' own grids have no more
MOST_SIDES = 4  # times the default side: what no machine has memory for is answered before it tries
MOST_SEED = 2**53 - 1  # what a browser's numbers hold exactly


@dataclass(frozen=True)
class Wanted:
    """One image asked for; None: what the scripts take, and of sizes the student's."""

    prompt: str
    seed: int
    steps: int | None = None
    sampler: str | None = None  # "x0" or "euler"
    height: int | None = None  # pixels
    width: int | None = None
    guidance: float | None = None


@dataclass(frozen=True)
class Drawn:
    """One image, as the scripts save it, and how long it took."""

    image: Image.Image
    wanted: Wanted
    plan: Plan
    levels: list[float]  # sigmas or timesteps that were used
    time_s: float  # of the whole call: text, network, VAE
    first: bool  # of this network since the start: with what is done only once


class Studio:
    """A student and, where it was read, its teacher; they share the encoders and the VAE.

    One image is drawn at a time, whoever asks.
    """

    def __init__(
        self,
        family: Family,
        args: dict[str, argparse.Namespace],
        student: Student,
        pipeline: DiffusionPipeline,
        networks: dict[str, nn.Module],
        machine: Machine,
    ) -> None:
        self.family = family
        self.student = student
        self.machine = machine
        self.networks = networks
        self._args = args
        self._pipeline = pipeline
        self._own_scheduler: SchedulerMixin = pipeline.scheduler
        self._inside: str | None = None  # whose network is in the pipeline
        self._known: set[str] = set()  # who has drawn
        self._lock = threading.Lock()
        self.default = make_plan(family, args[STUDENT], student.files, student.config)

    @property
    def has_teacher(self) -> bool:
        """Whether the teacher's network was read."""
        return TEACHER in self.networks

    @property
    def anchors(self) -> list[float]:
        """The noise levels that the student was trained at."""
        return trained_anchors(self.family, self._args[STUDENT], self.student.files.card)

    @property
    def base(self) -> Path:
        """The folder with the encoders, the VAE and perhaps the teacher."""
        base: Path = self._args[STUDENT].base
        return base

    @property
    def size_multiple(self) -> int:
        """What heights and widths are multiples of, in pixels."""
        return self.family.sides(self.base, self.student.config).multiple

    def plan(self, side: str, wanted: Wanted) -> Plan:
        """How STUDENT or TEACHER draws it; raises ValueError, as the scripts do, if it cannot."""
        args = argparse.Namespace(
            **{
                **vars(self._args[side]),
                "seed": wanted.seed,
                "steps": wanted.steps,
                "sampler": wanted.sampler,
                "height": self.default.height if wanted.height is None else wanted.height,
                "width": self.default.width if wanted.width is None else wanted.width,
                "guidance": wanted.guidance,
            }
        )
        if not wanted.prompt.strip():
            raise ValueError("the prompt is empty")
        check_counts(args, "steps")
        check_counts(args, "seed", least=0)
        check_finite(args, "guidance")
        _check_most("--seed", wanted.seed, MOST_SEED)
        _check_most("--steps", wanted.steps, MOST_STEPS)
        for flag, pixels in (("--height", wanted.height), ("--width", wanted.width)):
            _check_most(flag, pixels, MOST_SIDES * max(self.default.height, self.default.width))
        if side == TEACHER:
            return make_plan(self.family, args, None, None)
        return make_plan(self.family, args, self.student.files, self.student.config)

    def draw(self, side: str, wanted: Wanted, plan: Plan, on_step: Callable[[int], None]) -> Drawn:
        """The image; on_step is called with the number of forwards done and may raise to stop."""
        with self._lock:
            network = self._put(side)
            self._pipeline.scheduler = self.family.make_scheduler(self._own_scheduler, plan)
            hook = network.register_forward_hook(_Counter(on_step))
            generator = torch.Generator().manual_seed(wanted.seed)
            started = time.perf_counter()
            try:
                images = self.family.sample(
                    self._pipeline, [wanted.prompt.strip()], [generator], plan
                )
            finally:
                hook.remove()
                self._pipeline.maybe_free_model_hooks()  # offloading begins anew after a stop
            time_s = time.perf_counter() - started
            used = getattr(self._pipeline.scheduler, self.family.levels.name)[: plan.steps].tolist()
            first = side not in self._known
            self._known.add(side)
        return Drawn(images[0], wanted, plan, plan.levels or used, time_s, first)

    def _put(self, side: str) -> nn.Module:
        """The network of one side, in the pipeline."""
        network = self.networks[side]
        if self._inside != side:
            self._pipeline.remove_all_hooks()
            self._pipeline.register_modules(**{self.family.component: network})
            prepare(self._pipeline, self.family, self._args[STUDENT], self.machine.device)
            self._inside = side
        return network


class _Counter:
    """A forward hook that tells how many forwards there have been."""

    def __init__(self, on_step: Callable[[int], None]) -> None:
        self._on_step = on_step
        self._num = 0

    def __call__(self, *forward: object) -> None:
        self._num += 1
        self._on_step(self._num)


def _check_most(flag: str, value: int | None, most: int) -> None:
    if value is not None and value > most:
        raise ValueError(f"{flag} {value} is more than {most}, the most that this page draws")


def open_studio(
    family: Family,
    base: Path,
    checkpoint: Path,
    with_teacher: bool,
    ema: bool,
    config: Path | None,
    machine_flags: list[str],
) -> Studio:
    """Read the networks; raises ValueError when the student does not fit the base.

    machine_flags: --device, --dtype and --offload, as the scripts take them.
    """
    own = ["--checkpoint", str(checkpoint)] + ["--ema"] * ema
    own += [family.config_flag, str(config)] if config else []
    parser = build_parser(family)
    args = {
        side: parser.parse_args([family.base_flag, str(base), *flags, *machine_flags])
        for side, flags in ((STUDENT, own), (TEACHER, ["--teacher"]))
    }
    check_family(family, args[STUDENT])
    machine = find_machine(args[STUDENT])
    student = find_network(family, args[STUDENT])
    network = build(student, base / family.component, machine.dtype)
    if with_teacher:
        pipeline = family.open_pipeline(base, None, machine.dtype)
        networks = {STUDENT: network, TEACHER: getattr(pipeline, family.component)}
    else:
        pipeline = family.open_pipeline(base, network, machine.dtype)
        networks = {STUDENT: network}
    return Studio(family, args, student, pipeline, networks, machine)


def check_family(family: Family, args: argparse.Namespace) -> None:
    """Raise ValueError when the student's card names another family than the base's."""
    card = find_student(args.checkpoint, args.ema).card
    if card and card.family != family.name:
        raise ValueError(
            f"--checkpoint {args.checkpoint} is a student of family {card.family}, and --pipeline "
            f"{args.base} is {family.title}: name the teacher that it was distilled from"
        )
