"""A student of each embedded teacher, as a run's student/step_* holds it, and its export."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import in_memory
from diffusers import DiffusionPipeline
from PIL import Image
from torch import nn

from senseflow.common.files import ROOT, read_json
from senseflow.config.families import family_of
from senseflow.export import __main__ as export
from senseflow.sampling.cli import main
from senseflow.teachers.family import Family
from senseflow.weights.card import StudentCard, write_card
from senseflow.weights.fingerprint import base_fingerprint
from senseflow.weights.stored import Weights, component_weights
from senseflow.weights.student import build_student

PROMPT = "a red fox in the snow"  # the card's
SHIFT = 3.1582  # of the embedded FLUX's scheduler


def shifted(shift: float) -> tuple[float, ...]:
    """The anchors of the flow recipes."""
    return tuple(shift * u / (1 + (shift - 1) * u) for u in (1, 0.75, 0.5, 0.25))


@dataclass(frozen=True)
class Shipped:
    """A folder with a student, and the teacher it moved away from."""

    folder: Path
    base: Path
    family: Family
    anchors: tuple[float, ...]

    def export(self, output: Path, *flags: object) -> int:
        """The exit status of senseflow.export."""
        words = [self.folder, "--pretrained_model", self.base, "--output", output, *flags]
        return export.main(list(map(str, words)))


ANCHORS = {
    "flux": shifted(SHIFT),
    "sd35_medium": shifted(3),
    "sd35_large": shifted(3),
    "sdxl": (999, 749, 499, 249),
}


def save_student(name: str, folder: Path, **card: object) -> Shipped:
    """Weights near the teacher's, without its guidance embedding; `card` replaces some entries."""
    base = ROOT / "assets" / "tiny" / name / "pipeline"
    family = family_of(base, "base")
    network = moved(base / family.component, guided=card.get("guidance") is not None)
    network.save_pretrained(folder)
    facts = {
        "family": family.name,
        "anchors": ANCHORS[name],
        "height": 32,
        "width": 32,
        "guidance": None,
        "max_sequence_length": 12 if family.tokenizer else None,
        "base_name": "pipeline",
        "base_fingerprint": base_fingerprint(base / family.component),
        "iteration": 20,
    }
    known = StudentCard(**{**facts, **card})
    write_card(folder, known)
    return Shipped(folder, base, family, known.anchors)


def moved(component: Path, guided: bool) -> nn.Module:
    """A component's network with some noise on its weights."""
    config, weights = read_json(component / "config.json"), component_weights(component)
    if not guided and config.get("guidance_embeds"):
        config = {**config, "guidance_embeds": False}
        keys = [key for key in weights.keys if "guidance_embedder" not in key]
        weights = Weights(weights.source, keys, weights.read)
    network = build_student(weights, config, torch.float32, "config.json")
    generator = torch.Generator().manual_seed(0)
    for weight in network.parameters():
        if weight.numel() > 1:
            weight.add_(0.05 * weight.std() * torch.randn(weight.shape, generator=generator))
    return network


def script_of(folder: Path) -> str:
    """The usage on the card: at most ten lines, with torch and diffusers alone."""
    (script,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert len([line for line in script.splitlines() if line.strip()]) <= 10
    imported = re.findall(r"^(?:import|from) (\w+)", script, re.MULTILINE)
    assert imported == ["torch", "diffusers"]
    return script


def run_script(
    script: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[np.ndarray, dict[str, Any]]:
    """The image that a script saves when it is run beside the folder, and what it defined; its
    weights lie in memory as ours do."""
    monkeypatch.chdir(folder.parent)
    read = DiffusionPipeline.from_pretrained.__func__
    copied = classmethod(lambda cls, *args, **more: in_memory(read(cls, *args, **more)))
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", copied)
    names: dict[str, Any] = {}
    exec(script, names)
    monkeypatch.undo()
    return np.array(Image.open(folder.parent / "image.png")), names


def ours(shipped: Shipped, output: Path, *flags: object, seed: int = 0) -> np.ndarray:
    """The image of our script at batch 1, from the folder that was exported."""
    words = [shipped.family.base_flag, shipped.base, "--checkpoint", shipped.folder, "--seed", seed]
    words += ["--prompt", PROMPT, "--output_dir", output, *flags]
    assert main(shipped.family, list(map(str, words))) == 0
    (picture,) = output.glob("0*.png")
    return np.array(Image.open(picture))
