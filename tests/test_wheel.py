"""The package as it is installed: not editable, and used from outside this tree."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from made_up_run import make_run
from python import PYTHON

ROOT = Path(__file__).resolve().parents[1]
RESULT = {
    "name": "mine",
    "metric": "clip",
    "value": 31.5,
    "num_images": 4,
    "num_prompts": 4,
    "images": "out/mine",
    "reference": None,
    "model": "a model",
    "preprocessing": "crop",
    "weights": [],
    "versions": {"torch": "2.15.0"},
    "settings": {},
    "notes": [],
}


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The folder that pip puts a wheel's files into; nothing is fetched."""
    folder = tmp_path_factory.mktemp("installed")
    words = ["pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-compile"]
    copy = folder / "source"  # which a build may write to
    copy.mkdir()
    for name in ("setup.py", "README.md", "pyproject.toml", "senseflow"):
        (copy / name).symlink_to(ROOT / name)
    line = [sys.executable, "-m", *words, "--target", str(folder / "site"), str(copy)]
    subprocess.run(line, check=True, cwd=folder)
    return folder / "site"


def run(installed: Path, folder: Path, *words: object) -> str:
    """What a command of it says, started in another folder."""
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    line = [PYTHON, *map(str, words)]
    result = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_every_file_that_is_no_code_is_there(installed):
    files = [f for f in (ROOT / "senseflow").rglob("*") if f.is_file() and f.suffix != ".pyc"]
    assert {f.suffix for f in files} >= {".json", ".css", ".html", ".j2"}
    there = {str(f.relative_to(installed)) for f in installed.rglob("*")}
    assert {str(f.relative_to(ROOT)) for f in files} <= there


def test_pages_tables_and_scripts_come_from_it(installed, tmp_path):
    make_run(tmp_path / "run", num_rows=3, strips=())
    run(installed, tmp_path, "-m", "senseflow.report", "run")
    assert "<style>" in (tmp_path / "run" / "report.html").read_text()
    (tmp_path / "results.json").write_text(json.dumps([RESULT]))
    words = ["--published", "all", "--output_dir", "out"]
    run(installed, tmp_path, "-m", "senseflow.evaluate", "table", "results.json", *words)
    assert "31.5" in (tmp_path / "out" / "table.md").read_text()
    script = ROOT / "scripts_flux" / "test_flux_senseflow.py"
    assert "--flux_ckpt" in run(installed, tmp_path, script, "--help")
