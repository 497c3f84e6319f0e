"""The work of python -m senseflow.reconstruction_error, from its arguments to its files."""

import csv
import io
import json
import logging
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from senseflow.common.files import write_whole
from senseflow.common.pictures import save_whole
from senseflow.common.quiet import quiet_libraries
from senseflow.common.ranks import AgreedError
from senseflow.config.config import Config, load_config
from senseflow.config.recipes import RECIPES
from senseflow.core.anchors import Anchors
from senseflow.data.items import UnreadableImagesError
from senseflow.data.prompt_list import PromptList
from senseflow.engine.agreement import require_equal
from senseflow.engine.build import Teacher, check_teacher, prepare_teacher
from senseflow.engine.inputs import Inputs, read_inputs
from senseflow.reconstruction_error.measure import (
    Measurement,
    Rows,
    curves,
    measure,
    segments,
    spread_times,
)
from senseflow.reconstruction_error.picture import draw

logger = logging.getLogger("senseflow")

LIBRARIES = ("torch", "diffusers", "transformers")


@dataclass(frozen=True)
class Wanted:
    """What is to be measured, and where it goes: the flags."""

    config: Path
    overrides: list[str]
    output: Path
    num_samples: int
    num_times: int
    guidance: list[float]
    batch_size: int  # of a process


def run(wanted: Wanted) -> None:
    """Raises ValueError for wrong input, OSError for what cannot be read or written."""
    quiet_libraries()
    config = load_config(wanted.config, wanted.overrides)
    inputs = read_inputs(config, RECIPES[config.recipe].family)
    check_teacher(inputs)
    for scale in wanted.guidance:
        inputs.family.require_guidance("--guidance", scale)
    measurement = Measurement(
        config.train.seed,
        spread_times(inputs.path, wanted.num_times),
        tuple(wanted.guidance or [inputs.family.unguided]),
    )
    facts = facts_of(inputs, wanted.num_samples)
    rows = Rows(wanted.output / "samples.jsonl", {**vars(measurement), **facts})
    wanted.output.mkdir(parents=True, exist_ok=True)
    logger.info("%d of %d samples are measured", len(rows.rows), wanted.num_samples)
    try:
        teacher = prepare_teacher(inputs)
        require_equal({"the samples measured before": len(rows.rows)})
        measure(teacher, measurement, rows, wanted.num_samples, wanted.batch_size)
    except (AgreedError, UnreadableImagesError) as error:
        raise ValueError(str(error)) from error
    if teacher.ranks.is_main:
        found = {**facts, **curves(rows.rows[: wanted.num_samples], measurement, inputs.path)}
        write(wanted.output, found, teacher, config)


def facts_of(inputs: Inputs, num_samples: int) -> dict[str, Any]:
    """Whose error it is, and all but seed, times and guidance that it depends on."""
    config, settings, dataset = inputs.config, inputs.settings, inputs.data
    if isinstance(dataset, PromptList):
        raise ValueError(
            f"paths.dataset {config.paths.dataset} has prompts and no images, of which xi(t) is: "
            "name a JSON of images or an LMDB of latents"
        )
    if num_samples > len(dataset):
        raise ValueError(
            f"--num_samples {num_samples}: {config.paths.dataset} holds {len(dataset)}; say that "
            "many or fewer"
        )
    return {
        "teacher": {
            "name": settings.folder.name,
            "family": inputs.family.name,
            "fingerprint": inputs.fingerprint,
        },
        "data": {"fingerprint": dataset.fingerprint(), "crop": config.data.crop},
        "resolution": list(settings.resolution),
        "max_sequence_length": settings.max_sequence_length,
        "precision": {"compute": config.precision.compute, "vae": config.precision.vae},
        "versions": {name: version(name) for name in LIBRARIES},
    }


def write(folder: Path, found: dict[str, Any], teacher: Teacher, config: Config) -> None:
    """Write xi.json, xi.csv and xi.png into a folder."""
    anchors, margin = teacher.anchors, config.isg.margin
    tree = {
        "what": "one-step reconstruction error of the teacher over t (thousandths of its clock)",
        "recipe": config.recipe,
        "seed": config.train.seed,
        **found,
        "anchors": list(anchors.times),
        "segments": [list(anchors.segment(index)) for index in range(len(anchors))],
        "isg_margin": margin,
    }
    write_whole(folder / "xi.json", json.dumps(tree, indent=1) + "\n")
    write_whole(folder / "xi.csv", as_csv(found))
    title = f"{config.recipe}: one-step reconstruction error, N = {found['num_samples']}"
    save_whole(draw(found, anchors, title), folder / "xi.png")
    for line in report(found, anchors, margin):
        logger.info("%s", line)
    logger.info("%s", ", ".join(str(folder / name) for name in ("xi.json", "xi.csv", "xi.png")))


def as_csv(found: dict[str, Any]) -> str:
    """A row per guidance and time."""
    columns = ("error", "standard_error", "normalised", "normalised_standard_error")
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["guidance", "t", "sigma", *columns])
    for curve in found["curves"]:
        for k, (t, sigma) in enumerate(zip(found["times"], found["sigmas"], strict=True)):
            writer.writerow([curve["guidance"], t, sigma, *(curve[name][k] for name in columns)])
    return stream.getvalue()


def report(found: dict[str, Any], anchors: Anchors, margin: float) -> list[str]:
    """xi / E ||x_0||^2 at both ends of where ISG draws its mid-points, a line per segment."""
    errors = found["curves"][0]["normalised"]
    lines = []
    for low, high in segments(anchors, margin):
        clean, noisy = np.interp((low, high), found["times"], errors)
        lines.append(f"mid-points from {low:g} to {high:g}: error {clean:.3g} to {noisy:.3g}")
    return lines
