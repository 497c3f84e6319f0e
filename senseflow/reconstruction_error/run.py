"""The work of python -m senseflow.reconstruction_error, from its arguments to its files."""

import argparse
import csv
import io
import json
import logging
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
from senseflow.engine.agreement import require_equal
from senseflow.engine.build import Teacher, prepare_teacher
from senseflow.engine.inputs import check_teacher, read_data, teacher_settings
from senseflow.reconstruction_error.measure import (
    Measurement,
    Rows,
    curves,
    measure,
    segments,
    spread_times,
)
from senseflow.reconstruction_error.picture import draw
from senseflow.teachers.family import Family
from senseflow.weights.fingerprint import base_fingerprint

logger = logging.getLogger("senseflow")

LIBRARIES = ("torch", "diffusers", "transformers")


def run(args: argparse.Namespace) -> None:
    """Raises ValueError for wrong input, OSError for what cannot be read or written."""
    quiet_libraries()
    config = load_config(args.config, args.overrides)
    family = RECIPES[config.recipe].family
    check_teacher(config, family)
    path = family.path(teacher_settings(config))
    wanted = Measurement(
        config.train.seed, spread_times(path, args.num_times), tuple(args.guidance)
    )
    facts = facts_of(config, family, args.num_samples)
    rows = Rows(args.output / "samples.jsonl", {**vars(wanted), **facts})
    args.output.mkdir(parents=True, exist_ok=True)
    logger.info("%d of %d samples are measured", len(rows.rows), args.num_samples)
    try:
        teacher = prepare_teacher(config, family)
        require_equal({"the samples measured before": len(rows.rows)})
        measure(teacher, wanted, rows, args.num_samples, args.batch_size)
    except (AgreedError, UnreadableImagesError) as error:
        raise ValueError(str(error)) from error
    if teacher.ranks.is_main:
        found = {**facts, **curves(rows.rows[: args.num_samples], wanted, path)}
        write(args.output, found, teacher, config)


def facts_of(config: Config, family: Family, num_samples: int) -> dict[str, Any]:
    """Whose error it is, and all but seed, times and guidance that it depends on."""
    settings = teacher_settings(config)
    dataset = read_data(config, settings)
    if num_samples > len(dataset):
        raise ValueError(
            f"--num_samples {num_samples}: {config.paths.dataset} holds {len(dataset)}; say that "
            "many or fewer"
        )
    return {
        "teacher": {
            "name": settings.folder.name,
            "family": family.name,
            "fingerprint": base_fingerprint(settings.folder / family.component),
        },
        "data": {"fingerprint": dataset.fingerprint(), "crop": config.data.crop},
        "resolution": list(settings.resolution),
        "max_sequence_length": settings.max_sequence_length,
        "precision": {"compute": config.precision.compute, "vae": config.precision.vae},
        "versions": {name: version(name) for name in LIBRARIES},
    }


def write(folder: Path, found: dict[str, Any], teacher: Teacher, config: Config) -> None:
    """xi.json, xi.csv and xi.png."""
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
