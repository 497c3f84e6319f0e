"""Embedded teachers and students made of them in a moment, for `evaluate generate`."""

import json
from pathlib import Path

import diffusers
import numpy as np
import torch
from PIL import Image

from senseflow.config.families import family_of
from senseflow.weights.card import StudentCard, write_card
from senseflow.weights.fingerprint import base_fingerprint

ROOT = Path(__file__).resolve().parents[2]
BASES = {
    name: ROOT / "assets" / "tiny" / name / "pipeline"
    for name in ("flux", "sd35_medium", "sd35_large", "sdxl")
}
T5_LENGTH = 12
PROMPTS = ["a red seven", "a blue two", "a green nine"]


def make_student(name: str, run: Path) -> Path:
    """A run folder whose student is the embedded teacher with slightly other weights."""
    base = BASES[name]
    family = family_of(base, "base")
    network = getattr(diffusers, family.network_class).from_pretrained(base / family.component)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    folder = run / "student" / "step_0000020"
    network.save_pretrained(folder)
    anchors = tuple(family.default_anchors(base, 4))
    length = T5_LENGTH if family.tokenizer else None
    fingerprint = base_fingerprint(base / family.component)
    card = StudentCard(family.name, anchors, 32, 32, None, length, name, fingerprint, 20)
    write_card(folder, card)
    return run


def pictures(folder: Path) -> dict[str, np.ndarray]:
    """All images below a folder, by their path in it."""
    files = sorted(folder.rglob("*.png"))
    return {str(f.relative_to(folder)): np.array(Image.open(f)) for f in files}


def sidecar(file: Path) -> dict:
    return json.loads(file.read_text())
