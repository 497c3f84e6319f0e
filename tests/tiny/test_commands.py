"""The commands of the embedded teacher, as a user types them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from diffusers import FluxTransformer2DModel
from PIL import Image

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "assets" / "tiny" / "flux"


def run(module: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )


@pytest.mark.parametrize("module", ["pictures", "build", "measure"])
def test_help_gives_an_example(module):
    assert "example: python -m senseflow.tiny" in run(f"senseflow.tiny.{module}", "--help").stdout


def test_measure_writes_table_results_and_picture(tmp_path):
    teacher = FluxTransformer2DModel.from_pretrained(FOLDER / "pipeline" / "transformer")
    student = FluxTransformer2DModel.from_config({**teacher.config, "guidance_embeds": False})
    student.load_state_dict(teacher.state_dict(), strict=False)
    student.save_pretrained(tmp_path / "student")
    finished = run(
        "senseflow.tiny.measure",
        *("--pipeline", FOLDER / "pipeline", "--judge", FOLDER / "judge"),
        *("--student", f"mine={tmp_path / 'student'}", "--output", tmp_path / "report"),
        *("--num_prompts", "8", "--seeds", "2", "--columns", "4"),
    )
    rows = json.loads((tmp_path / "report" / "results.json").read_text())
    assert len(rows) == 15
    assert rows["teacher, 28 steps (reference)"]["fid_t"] == pytest.approx(0, abs=1e-3)
    assert {"mine, 4 steps, x0", "mine, 4 steps, euler", "mine, 1 step"} <= set(rows)
    table = (tmp_path / "report" / "table.md").read_text()
    assert table.strip() == finished.stdout.strip()
    assert Image.open(tmp_path / "report" / "comparison.png").size[0] > 4 * 64


@pytest.mark.long
def test_quick_build_makes_every_folder(tmp_path):
    run("senseflow.tiny.build", "flux", "--quick", "--output", tmp_path / "flux")
    rebuilt = {str(p.relative_to(tmp_path / "flux")) for p in (tmp_path / "flux").rglob("*.json")}
    shipped = {str(p.relative_to(FOLDER)) for p in FOLDER.rglob("*.json")}
    assert rebuilt == shipped
    assert (tmp_path / "flux" / "pipeline" / "transformer" / "config.json").read_text() == (
        FOLDER / "pipeline" / "transformer" / "config.json"
    ).read_text()
