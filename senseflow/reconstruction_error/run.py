"""The work of python -m senseflow.reconstruction_error, from its arguments to its files."""

import argparse
import csv
import io
import json
import logging
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from senseflow.common.pictures import save_whole
from senseflow.common.quiet import quiet_libraries
from senseflow.common.ranks import AgreedError
from senseflow.config.config import Config, load_config
from senseflow.config.recipes import RECIPES
from senseflow.core.anchors import Anchors
from senseflow.core.error_curve import ErrorCurve
from senseflow.data.items import UnreadableImagesError
from senseflow.engine.agreement import require_equal
from senseflow.engine.build import Teacher, prepare_teacher
from senseflow.engine.disk import write_whole
from senseflow.engine.inputs import check_teacher, read_data, teacher_settings
from senseflow.reconstruction_error.measure import Measurement, Rows, curves, measure, spread_times
from senseflow.reconstruction_error.picture import draw
from senseflow.teachers.family import Family
from senseflow.weights.fingerprint import base_fingerprint

logger = logging.getLogger("senseflow")

QUARTILES = (0.25, 0.5, 0.75)
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
    curve = ErrorCurve(tuple(found["times"]), tuple(found["curves"][0]["error"]))
    tree = {
        "what": "one-step reconstruction error of the teacher over t (thousandths of its clock)",
        "recipe": config.recipe,
        "seed": config.train.seed,
        **found,
        "anchors": list(anchors.times),
        "segments": [list(anchors.segment(index)) for index in range(len(anchors))],
        "isg_margin": margin,
        "midpoint_quartiles": midpoint_quartiles(anchors, margin, curve),
    }
    write_whole(folder / "xi.json", json.dumps(tree, indent=1) + "\n")
    write_whole(folder / "xi.csv", as_csv(found))
    title = f"{config.recipe}: one-step reconstruction error, N = {found['num_samples']}"
    save_whole(draw(found, anchors, margin, title), folder / "xi.png")
    for line in report(tree):
        logger.info("%s", line)
    logger.info("%s", ", ".join(str(folder / name) for name in ("xi.json", "xi.csv", "xi.png")))


def midpoint_quartiles(anchors: Anchors, margin: float, curve: ErrorCurve) -> dict[str, Any]:
    """25, 50 and 75 % of ISG's mid-points lie below these, per segment, by both laws."""
    u = torch.tensor(QUARTILES, dtype=torch.float64)
    return {
        "uniform": [anchors.midpoint(i, margin, u).tolist() for i in range(len(anchors))],
        "error": [anchors.midpoint(i, margin, u, curve).tolist() for i in range(len(anchors))],
    }


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


def report(tree: dict[str, Any]) -> list[str]:
    """How sampling by error would move the mid-points, a line per segment."""
    quartiles = tree["midpoint_quartiles"]
    rows = zip(tree["segments"], quartiles["uniform"], quartiles["error"], strict=True)
    return [
        f"segment {low:g} to {high:g}: median t_mid {uniform[1]:.0f} uniform, {error[1]:.0f} by "
        f"error (quartiles {error[0]:.0f}, {error[2]:.0f})"
        for (low, high), uniform, error in rows
    ]
