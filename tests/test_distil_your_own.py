"""The tutorial, docs/distil_your_own.md: its commands run in their order, as they are written."""

import json
import os
import re
import resource
import runpy
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from senseflow.report.signals import RULES

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "distil_your_own.md").read_text(encoding="utf-8")
FULL_SIZE = "/path/to/"  # of commands that are given a user's own files


def commands() -> list[list[str]]:
    """The words of every command of the page's bash blocks that needs no files of the user's."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.strip()]
    return [shlex.split(line) for line in lines if FULL_SIZE not in line]


def test_the_page_names_every_program_of_the_way_in_order():
    programs = [words[2] if words[1] == "-m" else words[1] for words in commands()]
    assert programs == [
        "senseflow.tiny.pictures",
        "senseflow.data.make",
        "senseflow.data.check",
        "senseflow.plan",
        "senseflow.reconstruction_error",
        "senseflow.cache",
        "exp_flux/train_flux_senseflow.sh",
        "senseflow.report",
        "senseflow.evaluate",
        "senseflow.report",
        "senseflow.tiny.measure",
        "senseflow.export",
    ]


def test_every_warning_signal_has_its_line():
    first_cells = re.findall(r"^\| ([^|]+) \|", PAGE, re.MULTILINE)
    assert {rule.name for rule in RULES} <= set(first_cells)


def cpu_s() -> float:
    """Of all processes that were waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_the_picture_of_collapse_is_drawn_from_run_folders(tmp_path, capsys):
    """docs/collapse.py: a run of two strips beside one of five, and one of none."""
    for name, num in (("student", 2), ("collapse", 5), ("empty", 0)):
        (tmp_path / name / "samples").mkdir(parents=True)
        (tmp_path / name / "config.yaml").write_text("recipe: flux_senseflow\n")
        rows = [{"iteration": i, "loss/fake": 1.0 + i, "ida/gap": 0.1} for i in range(1, 6)]
        (tmp_path / name / "stats.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        for i in range(num):
            file = tmp_path / name / "samples" / f"step_{i:07d}.png"
            Image.new("RGB", (384, 100), "red").save(file)
    main = runpy.run_path(str(ROOT / "docs" / "collapse.py"))["main"]
    folders = [str(tmp_path / name) for name in ("student", "collapse")]
    assert main([*folders, "--output", str(tmp_path / "x.png")]) == 0
    drawn = Image.open(tmp_path / "x.png").convert("RGB")
    reds = [n for n, colour in drawn.getcolors(2**24) if colour[0] > 200 > 60 > colour[1]]
    assert sum(reds) > 7 * 3000  # two strips, and four of the five
    assert main([str(tmp_path / "empty"), "--output", str(tmp_path / "y.png")]) == 2
    assert "has no strips" in capsys.readouterr().err


@pytest.mark.long
def test_the_commands_make_a_student_that_beats_its_teacher_at_4_steps(tmp_path):
    """In a folder that looks like the repository, with a runs/ of its own; says what each took."""
    for path in ROOT.iterdir():
        if path.name not in ("runs", ".git"):
            (tmp_path / path.name).symlink_to(path)
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    for words in commands():
        start, before = time.monotonic(), cpu_s()
        command = [sys.executable, *words[1:]] if words[0] == "python" else words
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=3000
        )
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stderr[-3000:]}"
        took = f"{time.monotonic() - start:6.1f} s, of CPU {cpu_s() - before:6.1f}"
        print(f"{took}  {' '.join(words[:3])}")
    own = tmp_path / "runs" / "own"
    rows = json.loads((own / "measured" / "results.json").read_text())
    teacher = rows["teacher, 4 steps, euler"]  # the better of its samplers
    for sampler in ("euler", "x0"):
        student = rows[f"own, 4 steps, {sampler}"]
        assert student["fid_t"] < 0.9 * teacher["fid_t"] and student["all"] > teacher["all"] + 0.1
    index = json.loads((own / "pipeline" / "model_index.json").read_text())
    assert index["_class_name"] == "FluxPipeline"
