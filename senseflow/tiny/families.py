"""Drawing with the stock pipelines of diffusers: how each family is called, and its samplers.

Students are read by senseflow.sampling, but not drawn by it, so that what is measured is what an
outsider gets; `cps` alone, which diffusers does not have, is the scheduler of the scripts.
"""

import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    FluxPipeline,
    LCMScheduler,
    ModelMixin,
    QwenImagePipeline,
    SchedulerMixin,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    ZImagePipeline,
)

from senseflow.common.fields import Bounds, plain
from senseflow.common.files import read_json
from senseflow.common.quiet import quiet
from senseflow.config import families
from senseflow.sampling.drawing import CPS, Paths
from senseflow.sampling.model import find_model
from senseflow.teachers.schedulers import FlowMatchCpsScheduler, VPCpsScheduler
from senseflow.tiny import flux2, qwen_image
from senseflow.tiny.pictures import SIZE
from senseflow.tiny.text import QWEN_LENGTH, T5_LENGTH

TEACHER_STEPS = 28
REFERENCE_SEED = 10_000
DENSEST = 8  # steps that LCM's few steps are chosen from, evenly
FewSteps = Annotated[int, Bounds(2, DENSEST)]
# made from the config of the pipeline's own
NewScheduler = Callable[[Mapping[str, Any]], SchedulerMixin]

FLOW_SAMPLERS: dict[str, NewScheduler] = {
    "euler": partial(FlowMatchEulerDiscreteScheduler.from_config, stochastic_sampling=False),
    "x0": partial(FlowMatchEulerDiscreteScheduler.from_config, stochastic_sampling=True),
    CPS: FlowMatchCpsScheduler.from_config,
}
# In four steps LCM and DDIM stop at 999, 749, 499, 249; SDXL's own Euler at 751, 501, 251, 1.
VP_SAMPLERS: dict[str, NewScheduler] = {
    "euler": EulerDiscreteScheduler.from_config,
    "lcm": partial(LCMScheduler.from_config, original_inference_steps=DENSEST),
    "ddim": partial(
        DDIMScheduler.from_config,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    ),
    CPS: partial(VPCpsScheduler.from_config, original_inference_steps=DENSEST),
}


def flow_steps(num_steps: int, length: int = T5_LENGTH) -> dict[str, Any]:
    """Few steps are the anchors; left to itself SD3.5's pipeline would end them at sigma .009."""
    if num_steps == TEACHER_STEPS:
        steps: dict[str, Any] = {"num_inference_steps": num_steps}
    else:
        steps = {"sigmas": [1 - step / num_steps for step in range(num_steps)]}  # to be shifted
    return {**steps, "max_sequence_length": length}


@dataclass(frozen=True)
class StockFamily:
    """What is peculiar to the pipelines of one class; by default as the flows have it.

    Of `teacher_samplers` and `student_samplers` the first draws many steps, the last a single one.
    """

    pipeline: type[DiffusionPipeline]
    steps: Callable[[int], dict[str, Any]]  # arguments of the call, by the number of steps
    guidance: float  # the teacher's
    network: str = "transformer"  # the component that a student replaces
    latent_shape: tuple[int, ...] = (8, 8, 8)  # of one sample, as the pipeline takes it
    samplers: dict[str, NewScheduler] = field(default_factory=lambda: FLOW_SAMPLERS)
    teacher_samplers: tuple[str, ...] = ("euler", "x0")
    student_samplers: tuple[str, ...] = ("euler", "x0")
    recipe_sampler: str = "x0"  # which of them the recipe samples with
    # changes to the config of the pipeline's scheduler, for students and for a single step
    student_clock: dict[str, Any] = field(default_factory=dict)
    one_step_clock: dict[str, Any] = field(default_factory=dict)

    @property
    def many_steps(self) -> "Method":
        """The teacher at its best, which students are measured against."""
        return Method("teacher", TEACHER_STEPS, self.teacher_samplers[0])

    def scheduler(self, own: Mapping[str, Any], method: "Method") -> SchedulerMixin:
        """The method's sampler, made from the config of the pipeline's own scheduler."""
        clock = {} if method.network == "teacher" else self.student_clock
        once = self.one_step_clock if method.num_steps == 1 else {}
        scheduler: Any = self.samplers[method.sampler]({**own, **clock, **once})
        return scheduler if method.eta is None else scheduler.with_eta(method.eta)


FAMILIES = {
    family.pipeline.__name__: family
    for family in (
        StockFamily(FluxPipeline, flow_steps, guidance=3.5, latent_shape=(16, 32)),
        StockFamily(StableDiffusion3Pipeline, flow_steps, guidance=4.5),
        StockFamily(
            Flux2KleinPipeline,
            # its own steps are the anchors, at any number of them
            lambda num: {"num_inference_steps": num, "max_sequence_length": QWEN_LENGTH},
            guidance=4.0,
            latent_shape=flux2.LATENT_SHAPE,
        ),
        # its guidance counts from 0: this is 5 of the others
        StockFamily(ZImagePipeline, partial(flow_steps, length=QWEN_LENGTH), guidance=4.0),
        StockFamily(
            QwenImagePipeline,
            partial(flow_steps, length=qwen_image.QWEN_IMAGE_LENGTH),
            guidance=4.0,
            latent_shape=qwen_image.LATENT_SHAPE,
            student_clock=qwen_image.STUDENT,
            one_step_clock=qwen_image.ONE_STEP,
        ),
        StockFamily(
            StableDiffusionXLPipeline,
            lambda num_steps: {"num_inference_steps": num_steps},  # the samplers' own spacing
            guidance=5.0,
            network="unet",
            samplers=VP_SAMPLERS,
            teacher_samplers=("euler", "ddim"),
            student_samplers=("lcm", "ddim"),
            recipe_sampler="lcm",
        ),
    )
}


def family_of(folder: Path) -> StockFamily:
    """The family of a pipeline folder; a ValueError where it is of none."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise ValueError(f"{folder} is not a pipeline folder: it has no model_index.json")
    name = read_json(index).get("_class_name")
    if name not in FAMILIES:
        raise ValueError(f"{index}: _class_name is {name!r}, not one of {', '.join(FAMILIES)}")
    return FAMILIES[name]


@dataclass(frozen=True)
class Method:
    """One row: which network ("teacher" or a student's name), how many steps, which sampler."""

    network: str
    num_steps: int
    sampler: str
    first_seed: int = 0
    eta: float | None = None  # of cps

    def label(self) -> str:
        """The row's name in tables and pictures."""
        steps = f"{self.num_steps} step" + ("s" if self.num_steps > 1 else "")
        sampler = "" if self.num_steps in (1, TEACHER_STEPS) else f", {self.sampler}"
        sampler += "" if self.eta is None else f" {plain(self.eta)}"
        suffix = " (reference)" if self.first_seed == REFERENCE_SEED else ""
        return f"{self.network}, {steps}{sampler}{suffix}"


Job = tuple[Method, int]  # and a seed


def few_step_methods(
    network: str, samplers: tuple[str, ...], several_steps: tuple[int, ...]
) -> list[Method]:
    """Several steps with every sampler, and 1 step, where they are the same."""
    several = [Method(network, steps, sampler) for steps in several_steps for sampler in samplers]
    return [*several, Method(network, 1, samplers[-1])]


def initial_latents(prompt_indices: range, seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Unit noise (B, *shape), one generator per prompt and seed, whatever the batch."""
    generator = torch.Generator()
    noise = [
        torch.randn(shape, generator=generator.manual_seed(1_000_003 * seed + index))
        for index in prompt_indices
    ]
    return torch.stack(noise)


class Sampler:
    """Draws pictures of prompts with a pipeline folder and any of several networks.

    `networks` begins with the folder's own, "teacher". guidance: the teacher's; None is its
    family's.
    """

    def __init__(self, folder: Path, prompts: list[str], guidance: float | None = None) -> None:
        self.family, self.prompts = family_of(folder), prompts
        self.folder = folder
        self.guidance = self.family.guidance if guidance is None else guidance
        self.teacher = families.family_of(folder, "--pipeline")
        with quiet():
            self.pipeline: Any = self.teacher.open_pipeline(folder, None, torch.float32)
        self.own_scheduler = self.pipeline.scheduler.config
        self.networks: dict[str, ModelMixin] = {
            "teacher": getattr(self.pipeline, self.family.network)
        }
        self.etas: dict[str, float | None] = {}  # of students, as their cards have it

    def add_student(self, name: str, checkpoint: Path) -> None:
        """A network by its name, from any checkpoint that the sampling scripts take."""
        student = find_model(self.teacher, Paths(self.folder, checkpoint))
        self.networks[name] = student.build(torch.float32)
        self.etas[name] = student.card.eta if student.card else None

    def as_trained(self, student: str, num_steps: int = 4) -> list[Method]:
        """By cps, if rewards have trained the student by it; at its ends it is another sampler."""
        eta = self.etas[student]
        return [Method(student, num_steps, CPS, eta=eta)] if eta and eta < 1 else []

    def guidance_of(self, network: str) -> float:
        """The teacher's guidance for the teacher and for whatever embeds one, none for others."""
        embeds = self.networks[network].config.get("guidance_embeds", False)
        return self.guidance if network == "teacher" or embeds else 0.0

    def untrained(self) -> ModelMixin:
        """The student before its first iteration: the teacher without its guidance."""
        teacher = self.networks["teacher"]
        if not teacher.config.get("guidance_embeds", False):
            return teacher
        network = type(teacher).from_config({**teacher.config, "guidance_embeds": False})
        network.load_state_dict({key: teacher.state_dict()[key] for key in network.state_dict()})
        return network.eval()

    @torch.no_grad()
    def draw(
        self, method: Method, seed: int, batch_size: int = 250, num: int | None = None
    ) -> torch.Tensor:
        """One picture per prompt, or of the first `num`: (P, 3, 32, 32) in [-1, 1]."""
        setattr(self.pipeline, self.family.network, self.networks[method.network])
        self.pipeline.scheduler = self.family.scheduler(self.own_scheduler, method)
        pictures = []
        num = len(self.prompts) if num is None else min(num, len(self.prompts))
        for start in range(0, num, batch_size):
            chunk = range(start, min(start + batch_size, num))
            # Pipelines of flows hand their scheduler no generator: fresh noise is the global one's.
            torch.manual_seed(1_000_003 * seed + start)
            output = self.pipeline(
                prompt=[self.prompts[index] for index in chunk],
                **self.teacher.guided(self.guidance_of(method.network), len(chunk)),
                height=SIZE,
                width=SIZE,
                latents=initial_latents(chunk, seed, self.family.latent_shape),
                output_type="pt",
                **self.family.steps(method.num_steps),
            )
            pictures.append(output.images.float() * 2 - 1)
        return torch.cat(pictures)

    def draw_seeds(self, method: Method, num_seeds: int) -> torch.Tensor:
        """Pictures (seeds, P, 3, 32, 32) from `num_seeds` consecutive seeds."""
        return torch.stack([self.draw(*job) for job in seeds_of(method, num_seeds)])

    @contextmanager
    def several(self, processes: int) -> Iterator[Callable[[Iterable[Job]], Iterator[np.ndarray]]]:
        """How that many processes, a thread each, draw the pictures (P, 3, 32, 32) of each job, in
        their order; 1 is this process. Their number changes no bit.
        """
        if processes == 1:
            yield lambda jobs: (self.draw(*job).numpy() for job in jobs)
            return
        # Forks share this one's networks; torch.set_num_threads(1) has left them no pool of threads
        # to miss. They begin when the jobs are handed over: before there is a bar, which has one.
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(processes, context, _lend, (self,)) as pool:
            try:
                yield partial(pool.map, _draw)
            finally:
                pool.shutdown(cancel_futures=True)


def seeds_of(method: Method, num_seeds: int) -> list[Job]:
    """A method with each of its consecutive seeds."""
    return [(method, method.first_seed + number) for number in range(num_seeds)]


_lent: list[Sampler] = []  # to this process, which draws


def _lend(sampler: Sampler) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    _lent.append(sampler)


def _draw(job: Job) -> np.ndarray:
    return _lent[0].draw(*job).numpy()
