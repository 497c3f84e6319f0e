"""From checked flags to image files: choose the network, sample in batches, write, picture."""

import argparse
import itertools
import logging
import math
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from PIL import Image
from tqdm import tqdm

import senseflow
from senseflow.common.devices import find_device
from senseflow.common.pictures import save_whole
from senseflow.config.families import check_keys
from senseflow.sampling.job import Prompt, Shot, prompt_shot, shard_of
from senseflow.sampling.planning import check_card, choose_config, make_plan
from senseflow.sampling.shots import missing_shots, write_shot
from senseflow.teachers.family import Family, Plan
from senseflow.weights.fingerprint import fingerprint, stored_weights
from senseflow.weights.stored import Weights
from senseflow.weights.student import (
    StudentFiles,
    build_lora_student,
    build_student,
    find_student,
    is_lora,
    open_weights,
    read_config,
)

logger = logging.getLogger(__name__)

GRID_CELLS = 64
GRID_SIDE = 512  # pixels at most of one cell


class Machine(NamedTuple):
    """Where is drawn, and in which type."""

    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True)
class Student:
    """A checkpoint's weights, found and looked into, but not read yet."""

    files: StudentFiles
    weights: Weights | None  # None: a LoRA on the base's own
    config: dict[str, Any]
    config_name: str


@dataclass(frozen=True)
class Job:
    """One way to draw, and the images to draw so."""

    name: str
    args: argparse.Namespace
    student: Student | None  # None: the base itself
    plan: Plan
    settings: dict[str, Any]
    shots: list[Shot]
    todo: list[Shot]  # of them


def generate(family: Family, args: argparse.Namespace, prompts: list[Prompt]) -> None:
    """Sample the images that are not there yet; raises ValueError for input that cannot be used."""
    shots = [prompt_shot(args.output_dir, prompt, args.seed) for prompt in prompts]
    machine = find_machine(args)
    student = None if args.teacher else find_network(family, args)
    job = make_job(family, args, student, machine, shots)
    draw_all(family, [job], machine)
    logger.info("%d images in %s, %d of them new", len(shots), args.output_dir, len(job.todo))
    write_grid([shot.file for shot in shots], args)


def find_machine(args: argparse.Namespace) -> Machine:
    """As --device and --dtype say; the libraries' own bars are off from here on."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    device = find_device(args.device)
    if args.offload and device.type == "cpu":
        raise ValueError("--offload moves idle parts from a GPU to the host: it needs a GPU")
    dtype = getattr(torch, args.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    return Machine(device, dtype)


def find_network(family: Family, args: argparse.Namespace) -> Student:
    """The student of --checkpoint; raises ValueError when it is not of this family."""
    files = find_student(args.checkpoint, args.ema)
    check_card(family, files.card, args)
    weights = open_weights(files.weights, files.ema)
    check_keys(family, files.weights, weights.keys)
    if is_lora(files.weights):
        if args.config:
            raise ValueError(f"{family.config_flag}: a LoRA is for the base's own network")
        own = args.base / family.component / "config.json"
        logger.info("LoRA: %s\nbase: %s", files.weights, own.parent)
        return Student(files, None, read_config(own), str(own))
    config, config_name = choose_config(family, files, weights, args)
    logger.info("weights: %s\nconfig: %s", files.weights, config_name)
    return Student(files, weights, config, config_name)


def make_job(
    family: Family,
    args: argparse.Namespace,
    student: Student | None,
    machine: Machine,
    shots: list[Shot],
    name: str = "",
) -> Job:
    """What there is to draw; raises ValueError when images are there, made with other settings."""
    files, config = (student.files, student.config) if student else (None, None)
    plan = make_plan(family, args, files, config)
    settings = describe(family, args, plan, student, machine.dtype)
    unknown = {family.levels.name} if student is None else set()  # until the scheduler has run
    todo = shots if args.overwrite else missing_shots(shots, settings, unknown)
    return Job(name, args, student, plan, settings, shots, todo)


def draw_all(family: Family, jobs: list[Job], machine: Machine) -> None:
    """Draw what is missing; jobs of one network must follow each other, so that it is read once."""
    pipeline, own_scheduler, drawn = None, None, None
    for job in (job for job in jobs if job.todo):
        if pipeline is None or job.student is not drawn:
            pipeline = _with_network(family, pipeline, job, machine)
            own_scheduler, drawn = own_scheduler or pipeline.scheduler, job.student
        pipeline.scheduler = family.make_scheduler(own_scheduler, job.plan)
        draw(family, pipeline, job)


def _with_network(
    family: Family,
    pipeline: DiffusionPipeline | None,
    job: Job,
    machine: Machine,
) -> DiffusionPipeline:
    """The pipeline with the job's network: opened, or the one in it exchanged for a student."""
    network = None
    if pipeline is not None:
        assert job.student, "the teacher comes first: its network comes with the pipeline"
        pipeline.remove_all_hooks()
        pipeline.register_modules(**{family.component: None})  # frees its memory
    if job.student:
        network = build(job.student, job.args.base / family.component, machine.dtype)
    if pipeline is None:
        pipeline = family.open_pipeline(job.args.base, network, machine.dtype)
    else:
        pipeline.register_modules(**{family.component: network})
    prepare(pipeline, family, job.args, machine.device)
    return pipeline


def build(student: Student, base: Path, dtype: torch.dtype) -> torch.nn.Module:
    """The student's network; base: the component folder of the pipeline it is drawn with."""
    if student.weights is None:
        return build_lora_student(student.files.weights, base, dtype)
    return build_student(student.weights, student.config, dtype, student.config_name)


def prepare(
    pipeline: DiffusionPipeline, family: Family, args: argparse.Namespace, device: torch.device
) -> None:
    """Add the LoRA, compile, move to the device."""
    pipeline.set_progress_bar_config(disable=True)
    if args.lora:
        add_lora(pipeline, family, args.lora)
    if args.compile:
        for module in getattr(pipeline, family.component).modules():
            if type(module).__name__ in family.blocks:
                module.compile()
    if args.offload:
        pipeline.enable_model_cpu_offload(device=device)
    else:
        pipeline.to(device)


def add_lora(pipeline: DiffusionPipeline, family: Family, path: Path) -> None:
    """Load a LoRA folder or file; raises ValueError when it changes nothing."""
    file = path.name if path.is_file() else None
    try:
        pipeline.load_lora_weights(path.parent if file else path, weight_name=file)
    except (ValueError, KeyError, RuntimeError, OSError) as error:
        raise ValueError(f"--lora {path} does not fit: {error}") from error
    if not pipeline.get_active_adapters():
        raise ValueError(f"--lora {path} holds nothing for the {family.component}")
    if len(adapters := pipeline.get_list_adapters()[family.component]) > 1:
        pipeline.set_adapters(adapters)  # the student's own LoRA stays


def describe(
    family: Family,
    args: argparse.Namespace,
    plan: Plan,
    student: Student | None,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """What an image depends on besides its prompt: the sidecar, and what a repeat must equal.

    Paths do not tell weights apart: files may have been replaced under the same name.
    """
    files, lora = student.files if student else None, args.lora
    return {
        "family": family.name,
        "base": str(args.base.resolve()),
        "base_weights": _short(stored_weights(args.base, "*/*")),
        "checkpoint": str(files.weights.resolve()) if files else None,
        "checkpoint_weights": _short(files.parts) if files else None,
        "ema": args.ema or None,
        "iteration": files.card.iteration if files and files.card else None,
        "config": student.config_name if student else None,
        "lora": str(lora.resolve()) if lora else None,
        "lora_weights": _short([lora] if lora.is_file() else stored_weights(lora))
        if lora
        else None,
        "steps": plan.steps,
        "sampler": plan.sampler,
        family.levels.name: plan.levels,
        "guidance": plan.guidance,
        "max_sequence_length": plan.max_sequence_length,
        "height": plan.height,
        "width": plan.width,
        "dtype": str(dtype).removeprefix("torch."),
    }


def _short(files: list[Path]) -> str:
    """The fingerprint of weights, as much of it as tells files apart."""
    return fingerprint(files)[:16]


def draw(family: Family, pipeline: DiffusionPipeline, job: Job) -> None:
    """Sample in batches; an image depends on its own seed alone."""
    versions = {
        "senseflow": senseflow.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    levels, plan = family.levels.name, job.plan
    quiet = not job.args.shard and os.environ.get("RANK", "0") != "0"  # one bar of all ranks
    with tqdm(total=len(job.todo), unit="image", desc=job.name or None, disable=quiet) as bar:
        for batch in _batches(job.todo, job.args.batch_size):
            generators = [torch.Generator().manual_seed(shot.seed) for shot in batch]
            images = family.sample(pipeline, [s.prompt.text for s in batch], generators, plan)
            used = plan.levels or getattr(pipeline.scheduler, levels)[: plan.steps].tolist()
            for shot, image in zip(batch, images, strict=True):
                write_shot(shot, image, {**job.settings, levels: used, "versions": versions})
                bar.update()


def _batches(todo: list[Shot], size: int) -> Iterator[list[Shot]]:
    iterator = iter(todo)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def write_grid(files: list[Path], args: argparse.Namespace) -> None:
    """The first images side by side in `grid.png` (`grid_IofN.png` of one shard)."""
    shard, num_shards = shard_of(args.shard)
    images = [Image.open(file).convert("RGB") for file in files[:GRID_CELLS]]
    if not images:
        return
    for image in images:
        image.thumbnail((GRID_SIDE, GRID_SIDE), Image.Resampling.LANCZOS)
    columns = math.ceil(math.sqrt(len(images)))
    width, height = (max(image.size[axis] for image in images) for axis in (0, 1))
    rows = math.ceil(len(images) / columns)
    grid = Image.new("RGB", (columns * width, rows * height), "white")
    for number, image in enumerate(images):
        grid.paste(image, (number % columns * width, number // columns * height))
    name = "grid.png" if num_shards == 1 else f"grid_{shard}of{num_shards}.png"
    save_whole(grid, args.output_dir / name)
