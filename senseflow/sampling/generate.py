"""From what is asked for to image files: what is missing is drawn in batches, written, pictured."""

import json
import logging
import math
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from PIL import Image
from tqdm import tqdm

import senseflow
from senseflow.common.pictures import save_whole
from senseflow.common.quiet import quiet_libraries
from senseflow.sampling.cut import in_sidecar, warn_of_cuts
from senseflow.sampling.drawing import Drawing, Machine, Paths
from senseflow.sampling.job import Output, Prompt, Shot, missing_shots, prompt_shot
from senseflow.sampling.model import Model, find_model
from senseflow.sampling.pipeline import Pipeline
from senseflow.teachers.family import Family, Plan

logger = logging.getLogger(__name__)

GRID_CELLS = 64
GRID_SIDE = 512  # pixels at most of one cell


@dataclass(frozen=True)
class Job:
    """One way to draw, and the images to draw so."""

    name: str
    model: Model
    plan: Plan
    settings: dict[str, Any]  # what their sidecars say
    shots: list[Shot]
    todo: list[Shot]  # of them


def generate(
    family: Family,
    paths: Paths,
    drawing: Drawing,
    machine: Machine,
    prompts: list[Prompt],
    output: Output,
) -> None:
    """Sample the images that are not there yet; raises ValueError for input that cannot be used."""
    shots = [prompt_shot(output.folder, prompt, drawing.seed) for prompt in prompts]
    quiet_libraries()
    model = find_model(family, paths)
    pipeline = Pipeline(model, machine)
    job = make_job(model, drawing, pipeline.dtype, shots, output.overwrite)
    draw_all([job], pipeline, output)
    logger.info("%d images in %s, %d of them new", len(shots), output.folder, len(job.todo))
    write_grid([shot.file for shot in shots], output)


def make_job(
    model: Model,
    drawing: Drawing,
    dtype: torch.dtype,
    shots: list[Shot],
    overwrite: bool,
    name: str = "",
) -> Job:
    """What there is to draw; raises ValueError when images are there, made with other settings."""
    plan = model.plan(drawing)
    settings = model.settings(plan, dtype)
    # a teacher's levels are not known until its scheduler has run
    unknown = set() if model.student else {model.family.levels.name}
    todo = shots if overwrite else missing_shots(shots, settings, unknown)
    return Job(name, model, plan, settings, shots, todo)


def draw_all(jobs: list[Job], pipeline: Pipeline, output: Output) -> None:
    """Draw what is missing; jobs of one model must follow each other, so that it is read once."""
    for job in (job for job in jobs if job.todo):
        pipeline.put(job.model)
        draw(job, pipeline, output)


def draw(job: Job, pipeline: Pipeline, output: Output) -> None:
    """Sample in batches; an image depends on its own seed alone."""
    versions = {
        "senseflow": senseflow.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    name = job.model.family.levels.name
    prompts = [shot.prompt.text for shot in job.todo]
    cuts = pipeline.cuts(prompts, job.plan)
    warn_of_cuts(prompts, cuts)
    with tqdm(
        total=len(job.todo), unit="image", desc=job.name or None, disable=output.silent
    ) as bar:
        for start in range(0, len(job.todo), output.batch_size):
            batch = job.todo[start : start + output.batch_size]
            texts, seeds = [shot.prompt.text for shot in batch], [shot.seed for shot in batch]
            images, levels = pipeline.draw(texts, seeds, job.plan)
            for shot, image, cut in zip(batch, images, cuts[start:], strict=False):
                made = {**job.settings, name: levels, "versions": versions}
                write_shot(shot, image, in_sidecar(cut) | made)
                bar.update()


def write_shot(shot: Shot, image: Image.Image, settings: dict[str, Any]) -> None:
    """The sidecar, then the image: an image that is there is whole and described.

    An older image goes first, so that it never lies beside the new sidecar. Raises OSError naming
    the file, such as on a full disk.
    """
    sidecar = {"prompt": shot.prompt.text, "index": shot.prompt.index, "seed": shot.seed}
    if shot.prompt.id is not None:
        sidecar["id"] = shot.prompt.id
    text = json.dumps({**sidecar, **settings}, indent=2, ensure_ascii=False) + "\n"
    try:
        shot.sidecar.parent.mkdir(parents=True, exist_ok=True)
        shot.file.unlink(missing_ok=True)
        shot.sidecar.write_text(text, encoding="utf-8")
        save_whole(image, shot.file)
    except OSError as error:
        raise type(error)(
            f"writing {shot.file} failed: {error}. Finished images are kept: mend this, then run "
            "the same command again"
        ) from error


def write_grid(files: list[Path], output: Output) -> None:
    """The first images side by side in `grid.png` (`grid_IofN.png` of one shard)."""
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
    shard, num_shards = output.shard
    name = "grid.png" if num_shards == 1 else f"grid_{shard}of{num_shards}.png"
    save_whole(grid, output.folder / name)
