"""What one call of the command line is to do, and what differs between families.

Light on purpose: the command line reads it before torch and diffusers are imported.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline
    from PIL import Image
    from torch import nn

ROOT = Path(__file__).resolve().parents[2]  # where the prompts and configs of this repository lie


@dataclass(frozen=True)
class Prompt:
    """One prompt and its number in the prompts file, which names its seed and file."""

    index: int
    text: str


@dataclass(frozen=True)
class Plan:
    """How every image of one call is sampled."""

    steps: int
    sampler: str  # "x0" or "euler"
    sigmas: list[float] | None  # None: the scheduler's own (teacher)
    guidance: float | None  # None: the network takes none
    max_sequence_length: int  # T5 tokens
    height: int
    width: int


@dataclass(frozen=True)
class Family:
    """One kind of teacher on the command line."""

    name: str
    title: str
    pipeline_class: str
    component: str  # the trained part's folder
    base_flag: str
    config_flag: str
    default_config: Path
    size_multiple: Callable[[Path], int]  # of height and width in pixels, from the base's folder
    fit_config: Callable[[dict[str, Any], bool], dict[str, Any]]  # the base's, to has_guidance
    open_pipeline: Callable[[Path, "nn.Module | None", "torch.dtype"], "DiffusionPipeline"]
    sample: Callable[
        ["DiffusionPipeline", list[str], list["torch.Generator"], Plan], list["Image.Image"]
    ]

    def check_base(self, folder: Path) -> None:
        """Raise ValueError unless the folder is a pipeline of this family."""
        index = folder / "model_index.json"
        if not index.is_file():
            raise ValueError(
                f"{self.base_flag} {folder} is not a diffusers folder of {self.title}: "
                f"{'no model_index.json in it' if folder.is_dir() else 'there is no such folder'}"
            )
        found = json.loads(index.read_text()).get("_class_name")
        if found != self.pipeline_class:
            raise ValueError(
                f"{self.base_flag} {folder} is a {found}; {self.title} is a {self.pipeline_class}"
            )

    def check_size(self, base: Path, height: int, width: int) -> None:
        """Raise ValueError unless both sides are positive multiples the VAE and network allow."""
        multiple = self.size_multiple(base)
        for name, side in (("--height", height), ("--width", width)):
            if side < multiple or side % multiple:
                raise ValueError(f"{name} {side} is not a positive multiple of {multiple}")


def shard_of(text: str | None) -> tuple[int, int]:
    """(i, n) of --shard i/n, else of torchrun's environment, else (0, 1)."""
    text = text or f"{os.environ.get('RANK', 0)}/{os.environ.get('WORLD_SIZE', 1)}"
    first, _, second = text.partition("/")
    if not (first.isdigit() and second.isdigit() and int(first) < int(second)):
        raise ValueError(f"--shard {text} is not I/N with 0 <= I < N")
    return int(first), int(second)
