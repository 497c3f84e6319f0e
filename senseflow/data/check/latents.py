"""What can be checked of an LMDB of latents: its rows, their numbers, their captions.

Sizes, crops and pictures are gone once an image is a latent: check the images before.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
from tqdm import tqdm

from senseflow.data.check.findings import Finding, Level, percentiles, share
from senseflow.data.items import UnreadableItem
from senseflow.data.latents_lmdb import SCALED_KEY, open_whole, read_row, read_shape

OFF_CENTRE = 1.0  # mean of a channel; scaled latents have means of a few tenths
DEVIATIONS = (0.4, 2.5)  # of all latents; scaled ones are near 1


@dataclass
class Rows:
    """What stands in the rows of an LMDB; a caption that cannot be read is empty."""

    shape: list[int]  # C h w
    captions: list[str]
    deviations: list[float] = field(default_factory=list)  # of the rows that can be read
    unreadable: list[tuple[int, str]] = field(default_factory=list)
    fatal: bool = False  # whether some row is missing or of another length, which ends a run
    equal: list[list[int]] = field(default_factory=list)  # groups
    mean: list[float] = field(default_factory=list)  # per channel
    deviation: list[float] = field(default_factory=list)
    scaled: bool | None = None  # None: it does not say


def read_rows(folder: Path) -> Rows:
    """Every row, once; raises ValueError for a folder that is no whole LMDB of latents."""
    environment = open_whole(folder)
    try:
        with environment.begin() as txn:
            num, *shape = read_shape(folder, txn)
            said = txn.get(SCALED_KEY)
            rows = Rows(shape, num * [""], scaled=None if said is None else said == b"1")
            _fill(rows, folder, txn, num)
    except lmdb.Error as error:
        raise ValueError(f"{folder} is damaged: {error}") from error
    return rows


def _fill(rows: Rows, folder: Path, txn: "lmdb.Transaction[bytes]", num: int) -> None:
    channels, shape = rows.shape[0], tuple(rows.shape)
    sums, squares, places = np.zeros(channels), np.zeros(channels), dict[bytes, list[int]]()
    for row in tqdm(range(num), unit="row", mininterval=0.5):
        try:
            stored, caption = read_row(folder, txn, row, num, shape)
        except UnreadableItem as error:
            rows.unreadable.append((row, error.reason))
            continue
        except ValueError as error:
            rows.unreadable.append((row, str(error)))
            rows.fatal = True
            continue
        rows.captions[row] = caption
        latents = stored.astype(np.float64).reshape(channels, -1)
        rows.deviations.append(float(latents.std()))
        sums += latents.mean(1)
        squares += np.square(latents).mean(1)
        places.setdefault(hashlib.blake2b(stored.tobytes(), digest_size=16).digest(), []).append(
            row
        )
    rows.equal = [group for group in places.values() if len(group) > 1]
    count = max(len(rows.deviations), 1)
    rows.mean = (sums / count).tolist()
    rows.deviation = np.sqrt((squares / count - (sums / count) ** 2).clip(0)).tolist()


def latent_findings(rows: Rows, max_unreadable: int) -> list[Finding]:
    """All that is to be said of the latents."""
    num, findings = len(rows.captions), []
    if rows.unreadable:
        stops = rows.fatal or len(rows.unreadable) > max_unreadable
        words = (
            f"{share(len(rows.unreadable), num)} cannot be read (data.max_unreadable allows "
            f"{max_unreadable}; a missing row or one of another length ends the run)"
        )
        places, reasons = zip(*rows.unreadable, strict=True)
        level: Level = "stops" if stops else "warning"
        findings.append(Finding("unreadable", level, words, [*places], [*reasons]))
    if rows.equal:
        more = sum(len(group) - 1 for group in rows.equal)
        words = f"{share(more, num)} repeat the latents of another (groups: {len(rows.equal)})"
        findings.append(Finding("duplicates", "warning", words, [*rows.equal]))
    return findings + _scale(rows)


def _scale(rows: Rows) -> list[Finding]:
    """Whether the latents look as a diffusion model sees them."""
    if not rows.deviations:
        return []
    overall = float(np.sqrt(np.mean(np.square(rows.deviation) + np.square(rows.mean))))
    far = max(abs(mean) for mean in rows.mean)
    if DEVIATIONS[0] <= overall <= DEVIATIONS[1] and far <= OFF_CENTRE:
        return []
    said = {None: "it does not say so", True: "it says so", False: "it says they are not"}
    words = (
        f"the latents have a size of {overall:.2g} and a channel with mean {far:.2g}; scaled ones "
        f"are near 1 and 0 ({said[rows.scaled]}): see data.latents_scaled"
    )
    return [Finding("scale", "warning" if rows.scaled is not False else "note", words)]


def latent_numbers(rows: Rows) -> dict[str, Any]:
    """Shape, scale and moments, as plain values."""
    return {
        "shape": rows.shape,
        "scaled": rows.scaled,
        "channel_mean": rows.mean,
        "channel_deviation": rows.deviation,
        "row_deviation": percentiles(rows.deviations),
    }
