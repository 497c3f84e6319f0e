"""A student and its teacher in one pipeline, how an image of either is drawn, and ended early."""

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image
from torch import nn

from senseflow.common.fields import check_range
from senseflow.common.quiet import quiet_libraries
from senseflow.sampling.cut import Cuts
from senseflow.sampling.drawing import Drawing, Machine, Paths
from senseflow.sampling.model import Model, find_model
from senseflow.sampling.pipeline import Pipeline
from senseflow.teachers.family import Family, Plan

STUDENT, TEACHER = "student", "teacher"
MOST_SIDES = 4  # times the default side: what no machine has memory for is answered before it tries
MOST_SEED = 2**53 - 1  # what a browser's numbers hold exactly


class Wanted(NamedTuple):
    """One image asked for; sizes it does not say are the student's."""

    prompt: str
    drawing: Drawing = Drawing()


@dataclass(frozen=True)
class Drawn:
    """One image, as the scripts save it, and how long it took."""

    image: Image.Image
    wanted: Wanted
    plan: Plan
    levels: list[float]  # sigmas or timesteps that were used
    cut: Cuts  # what the text encoders left out of the prompt
    time_s: float  # of the whole call: text, network, VAE
    first: bool  # of this network since the start: with what is done only once


class Studio:
    """A student and, where it was read, its teacher; they share the encoders and the VAE.

    One image is drawn at a time, whoever asks.
    """

    def __init__(
        self, pipeline: Pipeline, models: dict[str, Model], networks: dict[str, nn.Module]
    ) -> None:
        self.pipeline = pipeline
        self.student = models[STUDENT]
        self.default = self.student.plan(Drawing())
        self._models = models
        self._networks = networks
        self._known: set[str] = set()  # who has drawn
        self._lock = threading.Lock()

    @property
    def family(self) -> Family:
        """The family of the teacher, and of its student."""
        return self.student.family

    @property
    def teacher_guidance(self) -> float | None:
        """The teacher's own; None: its network takes none, or was not read."""
        return self._models[TEACHER].plan(Drawing()).guidance if self.has_teacher else None

    @property
    def has_teacher(self) -> bool:
        """Whether the teacher's network was read."""
        return TEACHER in self._models

    def plan(self, side: str, wanted: Wanted) -> Plan:
        """How STUDENT or TEACHER draws it; raises ValueError, as the scripts do, if it cannot."""
        drawing = wanted.drawing
        if not wanted.prompt.strip():
            raise ValueError("the prompt is empty")
        check_range("seed", drawing.seed, 0, MOST_SEED)
        most = MOST_SIDES * max(self.default.height, self.default.width)
        for field, pixels in (("height", drawing.height), ("width", drawing.width)):
            check_range(field, pixels, 1, most)
        height, width = drawing.height or self.default.height, drawing.width or self.default.width
        return self._models[side].plan(dataclasses.replace(drawing, height=height, width=width))

    def draw(self, side: str, wanted: Wanted, plan: Plan, on_step: Callable[[int], None]) -> Drawn:
        """The image; on_step is called with the number of forwards done and may raise to stop."""
        prompt, seed = wanted.prompt.strip(), wanted.drawing.seed
        with self._lock:
            self.pipeline.put(self._models[side], self._networks[side])
            (cut,) = self.pipeline.cuts([prompt], plan)
            started = time.perf_counter()
            (image,), levels = self.pipeline.draw([prompt], [seed], plan, on_step)
            time_s = time.perf_counter() - started
            first = side not in self._known
            self._known.add(side)
        return Drawn(image, wanted, plan, levels, cut, time_s, first)


def open_studio(family: Family, paths: Paths, with_teacher: bool, machine: Machine) -> Studio:
    """Read the networks; raises ValueError when the student does not fit the base."""
    quiet_libraries()
    student = find_model(family, paths)
    pipeline = Pipeline(student, machine)
    networks = {STUDENT: student.build(pipeline.dtype)}
    models = {STUDENT: student}
    if with_teacher:
        models[TEACHER] = Model(family, Paths(paths.base), None)
        pipeline.read(models[TEACHER])
        networks[TEACHER] = pipeline.network
    else:
        pipeline.read(student, networks[STUDENT])
    return Studio(pipeline, models, networks)


class Stopped(Exception):
    """Raised between two steps of an image that nobody waits for any more."""


class Stops:
    """One event for every browser session that draws."""

    def __init__(self) -> None:
        self._events: dict[str | None, threading.Event] = {}

    @contextmanager
    def drawing(self, session: str | None) -> Iterator[threading.Event]:
        """While this session draws: what `stop` will set."""
        self._events[session] = event = threading.Event()
        try:
            yield event
        finally:
            if self._events.get(session) is event:  # and no later one of the same session
                del self._events[session]

    def stop(self, session: str | None) -> None:
        """End what this session draws, if it does."""
        if event := self._events.get(session):
            event.set()

    def stop_all(self) -> None:
        """End what anyone draws."""
        for event in list(self._events.values()):
            event.set()
