"""The file xi.json, the teacher's error over t as it was measured: what of it training reads."""

import json
from pathlib import Path
from typing import Any

import torch

from senseflow.core.error_curve import ErrorCurve
from senseflow.core.path import Path as NoisePath

SIGMA_TOLERANCE = 1e-4


def read_curve(file: Path, fingerprint: str, path: NoisePath) -> ErrorCurve:
    """The first curve of an xi.json.

    fingerprint, path: those of the teacher it is to be used with. Raises ValueError for a file that
    is none, is damaged, or was measured on other weights or another noise schedule.
    """
    if not file.is_file():
        raise ValueError("there is no such file")
    try:
        tree: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        curve = ErrorCurve(tuple(tree["times"]), tuple(tree["curves"][0]["error"]))
        measured, sigmas = tree["teacher"]["fingerprint"], torch.tensor(tree["sigmas"])
    except (KeyError, IndexError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            "it is not an xi.json of python -m senseflow.reconstruction_error, or is damaged: "
            f"{error!r}"
        ) from error
    if measured != fingerprint:
        raise ValueError(
            f"it was measured on another teacher (fingerprint {str(measured)[:12]}, this one has "
            f"{fingerprint[:12]}): measure this one"
        )
    if curve.times[0] < path.clean or curve.times[-1] > path.noisiest:
        raise ValueError("its times are not all on this teacher's clock: measure it")
    _, own = path.alpha_sigma(torch.tensor(curve.times))
    if sigmas.shape != own.shape or not ((sigmas - own).abs() <= SIGMA_TOLERANCE).all():
        raise ValueError("its noise levels are not those of this teacher's scheduler: measure it")
    return curve
