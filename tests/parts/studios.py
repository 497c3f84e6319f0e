"""Opening the page's student and teacher on the tests' random pipelines."""

import json
import shutil
from pathlib import Path

import numpy as np
from cases import CASES, Case  # noqa: F401  for the tests
from command_line import call, only_picture
from diffusers import LCMScheduler
from PIL import Image

from senseflow.app.__main__ import build_parser, choose_folders
from senseflow.app.studio import Studio, open_studio
from senseflow.sampling.drawing import Machine

PROMPT = "a red seven"


def open_from(*flags: object) -> Studio:
    """As the command line opens it."""
    args = build_parser().parse_args([str(flag) for flag in flags])
    return open_studio(*choose_folders(args), Machine())


def save_run(case: Case, base: Path, folder: Path) -> Path:
    """A run with the case's student."""
    return case.save_run(folder / "run", base, case.student())


def save_exported(case: Case, base: Path, folder: Path) -> Path:
    """The base with the student in it, its card beside its weights, and its own scheduler."""
    run = case.save_run(folder / "to_export", base, case.student())
    pipeline = Path(shutil.copytree(base, folder / "exported"))
    shutil.rmtree(pipeline / case.family.component)
    shutil.copytree(run / "student" / "step_0000020", pipeline / case.family.component)
    if case.family.name == "sdxl":
        own = pipeline / "scheduler"
        config = json.loads((own / "scheduler_config.json").read_text())
        LCMScheduler.from_config(config).save_pretrained(own)
        index = json.loads((pipeline / "model_index.json").read_text())
        index["scheduler"] = ["diffusers", "LCMScheduler"]
        (pipeline / "model_index.json").write_text(json.dumps(index))
    return pipeline


def script_picture(case: Case, base: Path, output: Path, *flags: object) -> np.ndarray:
    """The picture that the family's script saves for PROMPT."""
    assert call(case.family, base, "--prompt", PROMPT, "--output_dir", output, *flags) == 0
    return only_picture(output)


def pixels(image: Image.Image) -> np.ndarray:
    return np.array(image)


def no_step(num: int) -> None:
    """Nobody watches."""
