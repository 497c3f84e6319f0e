"""Measures xi(t) = E ||x_0 - x_0_hat(x_t, t, c)||^2 of a teacher on real samples (SenseFlow).

Sample number s is the s-th of the training order; its noise is a function of seed and s and the
same at every t, so that neither batches nor ranks change the curve and it is smooth in t. What is
measured of each sample goes at once to a file of rows, and the next start goes on from there.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from senseflow.common.files import parse_json, write_whole
from senseflow.core.anchors import Anchors
from senseflow.core.draws import Draws
from senseflow.core.isg import reconstruction_error
from senseflow.core.path import Denoised, add_noise
from senseflow.core.path import Path as NoisePath
from senseflow.data.items import Position
from senseflow.data.sampler import collate, item_at
from senseflow.distill.state import (
    batch_on_device,
    clean_latents,
    conditioning,
    denoise_guided,
    on_device,
    times,
)
from senseflow.engine.build import Teacher
from senseflow.teachers.encoded import Conditioning

logger = logging.getLogger("senseflow")

Row = dict[str, Any]  # "sample", "power" ||x_0||^2, "errors" by guidance, then by time


@dataclass(frozen=True)
class Measurement:
    """What is measured; two that are equal measure the same of the same sample."""

    seed: int
    times: tuple[float, ...]  # rising, thousandths
    guidances: tuple[float, ...]


def spread_times(path: NoisePath, num: int) -> tuple[float, ...]:
    """`num` whole times, evenly spread over the clock and without its clean end.

    num is at most 1000: SDXL's clock has no more readings.
    """
    span = path.noisiest - path.clean
    return tuple(float(round(path.clean + span * k / num)) for k in range(1, num + 1))


class Rows:
    """The rows of a measurement, in the order of samples, in a file that a kill may cut.

    The first line says what they are of. Raises ValueError for a file of another measurement.
    """

    def __init__(self, file: Path, header: Row) -> None:
        self.file, self.header = file, json.loads(json.dumps(header))
        self.rows: list[Row] = []
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        found = [tree for line in lines if (tree := _parse(line)) is not None]
        if not found:
            return
        if found[0] != self.header:
            differing = [key for key in self.header if found[0].get(key) != self.header[key]]
            raise ValueError(
                f"{file} is of another measurement (other {', '.join(differing) or 'keys'}): name "
                "another --output, or remove that file"
            )
        for row in found[1:]:
            if row.get("sample") == len(self.rows):
                self.rows.append(row)

    def start(self) -> None:
        """Make the file, without what a kill may have cut."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        lines = [self.header, *self.rows]
        write_whole(self.file, "".join(json.dumps(line) + "\n" for line in lines))

    def add(self, rows: list[Row], write: bool) -> None:
        """Add the next rows, here and, where `write`, in the file."""
        self.rows += rows
        if write:
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write("".join(json.dumps(row) + "\n" for row in rows))


def _parse(line: str) -> Row | None:
    try:
        tree = parse_json(line, "a row")
    except ValueError:
        return None
    return tree if isinstance(tree, dict) else None


def measure(
    teacher: Teacher, wanted: Measurement, rows: Rows, num_samples: int, batch_size: int
) -> None:
    """Add the rows that are missing of the first `num_samples`; every rank calls it.

    batch_size: samples per process and forward.
    """
    main = teacher.ranks.is_main
    if main:
        rows.start()
    chunk = batch_size * teacher.ranks.world_size
    with tqdm(total=num_samples, initial=len(rows.rows), unit=" samples", disable=not main) as bar:
        for start in range(len(rows.rows), num_samples, chunk):
            chosen = range(start, min(start + chunk, num_samples))
            own = chosen[teacher.ranks.rank :: teacher.ranks.world_size]
            found = measure_samples(teacher, wanted, own or chosen[:1])  # idle ranks keep step
            added = _gathered(found if own else [])
            rows.add(added, write=main)
            bar.update(len(added))


def _gathered(mine: list[Row]) -> list[Row]:
    """The rows of all ranks, in the order of samples."""
    everyone: list[list[Row]] = [[]] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return sorted((row for rows in everyone for row in rows), key=lambda row: row["sample"])


@torch.no_grad()
def measure_samples(teacher: Teacher, wanted: Measurement, samples: range) -> list[Row]:
    """||x_0||^2 and ||x_0 - x_0_hat||^2 of some samples, means over their elements."""
    adapter, dataset = teacher.adapter, teacher.dataset
    places = [Position(1, s, item_at(wanted.seed, s, len(dataset))) for s in samples]
    batch = batch_on_device(teacher, collate([dataset[place] for place in places], False))
    for path, reason in batch.unreadable:
        logger.warning("another sample stands for %s: %s", path, reason)
    draws = Draws(wanted.seed, 0, tuple(samples))
    cond = conditioning(teacher, batch)
    x_0 = clean_latents(teacher, batch, draws, "posterior")
    # One eps at all times and guidances: what differs along the curve is t alone.
    eps = on_device(teacher, draws.normal("eps", adapter.latent_shape()))

    def error(guidance: float, time: float) -> Tensor:
        """The error (B,) of each sample's one-step prediction at one time and guidance."""
        t = times(time, len(x_0), teacher.device)
        x_t = add_noise(adapter.path, x_0, eps, t)
        return reconstruction_error(x_0, predict(teacher, x_t, t, cond, guidance).x_0)

    errors = torch.stack(
        [torch.stack([error(w, time) for time in wanted.times]) for w in wanted.guidances]
    )  # (G, T, B)
    power = reconstruction_error(x_0, torch.zeros_like(x_0))
    return [
        {"sample": s, "power": p, "errors": e}
        for s, p, e in zip(samples, power.tolist(), errors.movedim(2, 0).tolist(), strict=True)
    ]


def predict(
    teacher: Teacher, x_t: Tensor, t: Tensor, cond: Conditioning, guidance: float
) -> Denoised:
    """The teacher's prediction; with classifier-free guidance at 1 its conditional half alone."""
    adapter = teacher.adapter
    if guidance == teacher.unguided:
        return adapter.path.read(adapter.predict(teacher.teacher, x_t, t, cond), x_t, t)
    return denoise_guided(teacher, x_t, t, cond, torch.full_like(t, guidance))


# ------------------------------------------------------------------------------------ statistics


def curves(rows: list[Row], wanted: Measurement, path: NoisePath) -> Row:
    """xi raw and divided by E ||x_0||^2, with standard errors, as xi.json has it.

    The first time is the clean end, where x_t = x_0 and the error is exactly 0.
    """
    clock = (path.clean, *wanted.times)
    power = torch.tensor([row["power"] for row in rows], dtype=torch.float64)  # (N,)
    errors = torch.tensor([row["errors"] for row in rows], dtype=torch.float64)  # (N, G, T)
    errors = torch.cat([torch.zeros_like(errors[..., :1]), errors], 2)
    if not errors.isfinite().all():
        raise ValueError("the teacher's prediction is not finite: try precision.compute=float32")
    _, sigma = path.alpha_sigma(torch.tensor(clock))
    return {
        "num_samples": len(rows),
        "power": power.mean().item(),
        "times": list(clock),
        "sigmas": sigma.tolist(),
        "curves": [
            {"guidance": guidance, **_statistics(errors[:, g], power)}
            for g, guidance in enumerate(wanted.guidances)
        ],
    }


def _statistics(errors: Tensor, power: Tensor) -> Row:
    """errors (N, T), power (N,); the ratio's standard error is that of its linearisation."""
    xi, size = errors.mean(0), power.mean()
    ratio = xi / size
    root = len(errors) ** 0.5
    residual = (errors - ratio * power[:, None]).std(0) / root / size
    return {
        "error": xi.tolist(),
        "standard_error": (errors.std(0) / root).tolist(),
        "normalised": ratio.tolist(),
        "normalised_standard_error": residual.tolist(),
    }


def segments(anchors: Anchors, margin: float) -> list[tuple[float, float]]:
    """Where ISG draws mid-points, from the noisiest segment to the cleanest."""
    spans = (anchors.segment(index) for index in range(len(anchors)))
    return [(low + margin, high - margin) for low, high in spans]
