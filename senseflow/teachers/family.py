"""What differs between families of teachers on the command line, and how an image is sampled.

Light on purpose: the command line reads it before torch and diffusers are imported.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from senseflow.core.levels import Levels

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline, SchedulerMixin
    from PIL import Image
    from torch import nn


@dataclass(frozen=True)
class Plan:
    """How every image of one call is sampled."""

    steps: int
    sampler: str  # "x0" or "euler"
    levels: list[float] | None  # sigmas or timesteps; None: the scheduler's own (teacher)
    guidance: float | None  # None: the network takes none
    max_sequence_length: int | None  # T5 tokens; None: no T5
    height: int
    width: int


@dataclass(frozen=True)
class Sides:
    """Which heights and widths, in pixels, a base can draw."""

    multiple: int
    default: int  # of students that do not say
    largest: int | None = None


@dataclass(frozen=True)
class StockSampling:
    """How a plain diffusers pipeline samples a student at its anchors."""

    scheduler: str  # class in diffusers
    changes: dict[str, Any]  # to the config of the base's scheduler
    levels: dict[str, Any]  # of the pipeline's call: num_inference_steps, or sigmas or timesteps
    guidance: float  # of the call, for a student that takes none


@dataclass(frozen=True)
class Family:
    """One kind of teacher on the command line: all that differs, said in the family's own module.

    A new family is a module with one of these, a script of a few lines, and its place in
    `senseflow.teachers.families`.
    """

    name: str  # on its students' cards
    title: str
    script: str  # from the repository's root
    pipeline_class: str
    network_class: str
    component: str  # the trained part's folder
    key_mark: str  # how some key of its networks begins, and no key of another family's
    blocks: tuple[str, ...]  # classes that --compile compiles
    base_flag: str
    config_flag: str
    levels: Levels
    teacher_steps: int
    teacher_guidance: float
    default_anchors: Callable[[Path], list[float]]  # of the base, for students without a card
    sides: Callable[[Path, dict[str, Any] | None], Sides]  # of the base and the student's config
    make_scheduler: Callable[["SchedulerMixin", Plan], "SchedulerMixin"]  # from the base's own
    stock_sampling: Callable[[tuple[float, ...]], StockSampling]  # at a card's anchors
    open_pipeline: Callable[[Path, "nn.Module | None", "torch.dtype"], "DiffusionPipeline"]
    sample: Callable[
        ["DiffusionPipeline", list[str], list["torch.Generator"], Plan], list["Image.Image"]
    ]
    method: str = "SenseFlow"
    t5_length: Callable[[Path], int] | None = None  # by default, of the base; None: no T5
    last_config: Path | None = None  # for a base without a config of its network
    is_this_size: Callable[[Path], bool] = lambda base: True  # False: another family's, same class
    takes_guidance: Callable[[dict[str, Any]], bool] = lambda config: False  # a student's config
    fit_config: Callable[[dict[str, Any], list[str]], dict[str, Any]] = lambda config, keys: config
    # levels of a student with a card's anchors, as stock_sampling's scheduler rounds them
    rounded: Callable[[tuple[float, ...], list[float]], list[float]] = lambda anchors, levels: (
        levels
    )


def base_config(base: Path, part: str) -> dict[str, Any]:
    """config.json of a base's part, {} without one."""
    file = base / part / "config.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def vae_factor(base: Path) -> int:
    """Pixels of one latent: 8 for all full-size bases."""
    file = base / "vae" / "config.json"
    return int(2 ** (len(json.loads(file.read_text())["block_out_channels"]) - 1))


def stated_length(tokenizer: Path, most: int) -> int:
    """The tokens a base's T5 tokenizer states, at most `most`."""
    file = tokenizer / "tokenizer_config.json"
    stated = json.loads(file.read_text()).get("model_max_length") if file.is_file() else None
    return int(min(stated or most, most))
