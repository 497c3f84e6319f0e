"""What is said of a teacher before its networks are read costs no import of their libraries."""

import json
import subprocess
import sys

from senseflow.common.files import ROOT

PROGRAM = """
import json
import sys
from pathlib import Path
from senseflow.config.families import family_of
from senseflow.config.recipes import FAMILIES

assert "torch" not in sys.modules
import torch
from senseflow.teachers.folder import TeacherSettings

heavy = {"diffusers", "transformers", "peft", "accelerate"}
seen = set()
for folder, shape in json.loads(sys.argv[1]).items():
    base = Path(folder)
    family = family_of(base, "--base")
    length = 12 if family.tokenizer else None
    settings = TeacherSettings(base, (32, 32), length, None, torch.float32, torch.float32)
    family.require(settings)
    anchors = family.anchors(settings, (999.0, 500.0))
    assert len(family.sampled_at(family.path(settings), anchors)) == 2
    assert family.latent_shape(settings) == tuple(shape)
    seen.add(family)
assert seen == set(FAMILIES) and not heavy & set(sys.modules)
"""


def test_a_folder_is_checked_without_diffusers_and_named_without_torch(
    flux2_folder, z_image_folder, qwen_image_folder
):
    tiny = [f"assets/tiny/{n}/pipeline" for n in ("flux", "sdxl", "sd35_medium", "sd35_large")]
    shapes = {**dict.fromkeys(tiny, (8, 8, 8)), str(flux2_folder): (16, 8, 8)}
    shapes |= {str(folder): (4, 16, 16) for folder in (z_image_folder, qwen_image_folder)}
    line = [sys.executable, "-c", PROGRAM, json.dumps(shapes)]
    result = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
