"""Calling the inference command line in this process, and reading what it wrote."""

import json
from pathlib import Path

import numpy as np
from diffusers import DiffusionPipeline
from PIL import Image
from torch import nn

from senseflow.sampling.cli import main
from senseflow.teachers.family import Family

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ["a red seven", "a blue cat", "three green apples in a bowl"]


def call(family: Family, base: Path, *flags: object) -> int:
    """The main of the family's script."""
    return main(family, [family.base_flag, str(base), *map(str, flags)])


def error_of(capsys, family: Family, base: Path, *flags: object) -> str:
    """The one line of an exit with status 2."""
    capsys.readouterr()
    try:
        status = call(family, base, *flags)
    except SystemExit as stop:
        status = stop.code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(lines) == 1
    return lines[0]


def prompt_flags(prompts=PROMPTS) -> list[str]:
    return [word for prompt in prompts for word in ("--prompt", prompt)]


def pictures(folder: Path) -> dict[str, np.ndarray]:
    return {f.name: np.array(Image.open(f)) for f in sorted(folder.glob("0*.png"))}


def only_picture(folder: Path) -> np.ndarray:
    (picture,) = pictures(folder).values()
    return picture


def sidecars(folder: Path) -> list[dict]:
    return [json.loads(f.read_text()) for f in sorted(folder.glob("0*.json"))]


def grey_levels_apart(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b).max())


def in_memory(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """The pipeline with its weights copied out of their file's map: products round by how weights
    are aligned, which there is as the file has it."""
    parts = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    for part in parts:
        for tensor in (*part.parameters(), *part.buffers()):
            tensor.data = tensor.data.clone()
    return pipeline
