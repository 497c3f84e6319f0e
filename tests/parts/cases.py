"""Every family's script on its random pipeline, for tests that hold for all of them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import flux2_pipeline
import flux_pipeline
import qwen_image_pipeline
import sd35_pipeline
import sdxl_pipeline
import torch
import z_image_pipeline
from text_parts import QWEN_LENGTH, T5_LENGTH
from torch import nn

from senseflow.teachers.family import Family
from senseflow.teachers.flux.family import FLUX
from senseflow.teachers.flux2.family import FLUX2
from senseflow.teachers.qwen_image.family import QWEN_IMAGE
from senseflow.teachers.sd35.family import SD35, SD35_LARGE
from senseflow.teachers.sdxl.family import SDXL
from senseflow.teachers.z_image.family import Z_IMAGE
from senseflow.weights.card import StudentCard, write_card
from senseflow.weights.fingerprint import base_fingerprint


@dataclass(frozen=True)
class Case:
    """A family, how its tiny network is made, and how its tests' student was trained."""

    family: Family
    base: str  # the fixture with the base's folder
    network: Callable[[], nn.Module]
    anchors: tuple[float, ...]
    default_anchors: tuple[float, ...]
    length: int | None = 12
    longest: int | None = T5_LENGTH  # that the base's tokenizer states
    size: tuple[int, int] = (24, 32)

    def student(self, seed: int = 1) -> nn.Module:
        """Other weights than the base's."""
        torch.manual_seed(seed)
        return self.network()

    def save_run(self, run: Path, base: Path, network: nn.Module) -> Path:
        """A run folder with one exported student and its card."""
        folder = run / "student" / "step_0000020"
        network.save_pretrained(folder)
        fingerprint = base_fingerprint(base / self.family.component)
        name, (height, width) = self.family.name, self.size
        card = (name, self.anchors, height, width, None, self.length, "pipeline", fingerprint, 20)
        write_card(folder, StudentCard(*card))
        return run


CASES = {
    "flux": Case(
        FLUX,
        "flux_folder",
        lambda: flux_pipeline.transformer(guidance_embeds=False),
        (1.0, 0.9, 0.7, 0.5),
        (1.0, 0.9045, 0.7595, 0.5128),
    ),
    "sd35": Case(
        SD35,
        "sd35_folder",
        sd35_pipeline.transformer,
        (1.0, 0.91, 0.76, 0.51),
        (1.0, 0.9, 0.75, 0.5),
    ),
    "sd35_large": Case(
        SD35_LARGE,
        "sd35_large_folder",
        lambda: sd35_pipeline.transformer(large=True),
        (1.0, 0.91, 0.76, 0.51),
        (1.0, 0.9, 0.75, 0.5),
    ),
    "sdxl": Case(
        SDXL, "sdxl_folder", sdxl_pipeline.unet, (999, 759, 509, 259), (999, 749, 499, 249),
        None, None,
    ),
    "dmd2": Case(
        SDXL, "sdxl_folder", sdxl_pipeline.unet, (999, 759, 509, 259), (999, 749, 499, 249),
        None, None,
    ),
    "flux2": Case(
        FLUX2,
        "flux2_folder",
        flux2_pipeline.transformer,
        (1.0, 0.96, 0.9, 0.75),
        (1.0, 0.9674, 0.9081, 0.7672),
        longest=QWEN_LENGTH,
    ),
    "z_image": Case(
        Z_IMAGE,
        "z_image_folder",
        z_image_pipeline.transformer,
        (1.0, 0.94, 0.85, 0.65),
        (1.0, 0.9474, 0.8571, 0.6667),
        longest=QWEN_LENGTH,
    ),
    "qwen_image": Case(
        QWEN_IMAGE,
        "qwen_image_folder",
        qwen_image_pipeline.transformer,
        (1.0, 0.91, 0.76, 0.51),
        (1.0, 0.9, 0.75, 0.5),
        longest=QWEN_LENGTH,
    ),
}  # fmt: skip
