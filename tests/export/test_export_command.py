"""A run on two ranks, saved in the background, with an EMA; and `python -m senseflow.export`."""

import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from python import PYTHON
from safetensors.torch import load_file
from small_disk import small_disk

from senseflow.engine.checkpoint_reader import OpenCheckpoint
from senseflow.export import __main__ as export
from senseflow.export import folders
from senseflow.tiny.pictures import write_dataset
from senseflow.weights.card import read_card
from senseflow.weights.student import find_student

WEIGHTS = "diffusion_pytorch_model.safetensors"
BASE = "assets/tiny/flux/pipeline"
CONFIG = "configs/FLUX/flux_senseflow_tiny.yaml"
SETTINGS = [
    "train.iter_num=4",
    "train.batch_size=4",
    "train.save_interval=2",
    "train.log_interval=2",
    "train.keep_last=0",
    "train.async_save=true",
    "ema.decay=0.5",
    "log.sample_interval=0",
    "lr_scheduler.warmup_iterations=0",
    "lr_scheduler.decay_iterations=0",
    "adversarial.kind=none",
    "isg.weight=0",
]


def train(data: Path, folder: Path, *overrides: str, gpus: int = 2) -> subprocess.CompletedProcess:
    words = ["sh", "exp_flux/train_flux_senseflow.sh", "1", str(gpus), CONFIG, str(folder)]
    environment = {**os.environ, "PYTHON": PYTHON, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*words, f"paths.dataset={data}", *SETTINGS, *overrides],
        capture_output=True, text=True, env=environment, timeout=600,
    )  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder, num=24, seed=0, num_prompts=4)
    return folder / "data.json"


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    result = train(data, folder)
    assert result.returncode == 0, result.stderr
    return folder


def command(*words: str | Path) -> tuple[int, str]:
    """Exit status and errors of the command."""
    result = subprocess.run(
        [PYTHON, "-m", "senseflow.export", *map(str, words)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    return result.returncode, result.stderr


def test_the_average_is_the_closed_form_of_the_exported_students(finished):
    """theta moves at iterations 2 and 4; the average began at the teacher's weights."""
    states = [load_file(finished / k / f"step_000000{i}" / WEIGHTS) for k, i in (
        ("ema", 2), ("ema", 4), ("student", 4))]  # fmt: skip
    assert states[0].keys() == states[1].keys() == states[2].keys()
    for key, before in states[0].items():
        torch.testing.assert_close(states[1][key], 0.5 * before + 0.5 * states[2][key])
    assert any(not torch.equal(states[1][k], states[2][k]) for k in states[1])


@pytest.mark.parametrize("kind", ["student", "ema"])
def test_the_command_writes_what_the_run_wrote(finished, tmp_path, kind):
    own, flags = finished / kind / "step_0000004", ["--ema"] if kind == "ema" else []
    assert export.main([str(finished), "--output", str(tmp_path / "out"), *flags]) == 0
    names = sorted(p.name for p in own.iterdir())
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted([*names, "README.md"])
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (own / name).read_bytes()
    assert read_card(own).ema == (0.5 if kind == "ema" else None)


def test_it_holds_one_tensor_at_a_time(finished, tmp_path, monkeypatch):
    """When the next one is read, of all before at most the last is still in memory."""
    seen, read = [], OpenCheckpoint.read

    def watched(self, key, dtype):
        assert sum(tensor() is not None for tensor in seen) <= 1
        value = read(self, key, dtype)
        seen.append(weakref.ref(value))
        return value

    monkeypatch.setattr(OpenCheckpoint, "read", watched)
    assert export.main([str(finished), "--output", str(tmp_path / "out")]) == 0
    assert len(seen) == len(load_file(tmp_path / "out" / WEIGHTS))


def test_a_checkpoint_ships_as_the_students_own_folder_does(finished, tmp_path):
    """The same whole pipeline, of the run's average, with the run's recipe on its card."""
    outs = tmp_path / "a" / "out", tmp_path / "b" / "out"
    flags = ["--form", "pipeline", "--ema"]
    assert export.main([str(finished), "--output", str(outs[0]), *flags]) == 0
    step = finished / "ema" / "step_0000004"
    assert export.main([str(step), "--output", str(outs[1]), *flags]) == 0
    names, others = (sorted(f.relative_to(o) for f in o.rglob("*.*")) for o in outs)
    assert names == others and len(names) > 12
    for name in (name for name in names if (outs[0] / name).is_file()):
        assert (outs[0] / name).read_bytes() == (outs[1] / name).read_bytes(), name
    card = (outs[0] / "README.md").read_text()
    assert "| recipe | `flux_senseflow` |" in card and "EMA, decay 0.5" in card


def test_an_older_checkpoint_in_another_type(finished, tmp_path):
    step = finished / "checkpoints" / "step_0000002"
    words = [step, "--output", tmp_path / "out", "--dtype", "bfloat16"]
    status, said = command(*words)
    assert status == 0 and said.strip().endswith(f"student of iteration 2 in {words[2]}, bfloat16")
    loaded = FluxTransformer2DModel.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    own = load_file(finished / "student" / "step_0000002" / WEIGHTS)
    assert all(torch.equal(v, own[k].bfloat16()) for k, v in loaded.state_dict().items())


def test_errors_are_one_line(finished, tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "out"
    run.mkdir()
    for name in ("checkpoints", "config.yaml"):
        (run / name).symlink_to(finished / name)
    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    config = (moved / "config.yaml").read_text().replace(BASE, "/nowhere/flux")
    (moved / "config.yaml").write_text(config)
    for step in (moved / "checkpoints").iterdir():
        for file in step.glob("*.distcp"):
            if step.name == "step_0000004":
                file.write_bytes(file.read_bytes()[:-1])
    (tmp_path / "there").mkdir()

    def error_of(*words: str | Path) -> str:
        assert export.main(list(map(str, words))) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1
        return said

    assert "none does not exist" in error_of(tmp_path / "none", "--output", out)
    assert "holds no complete checkpoint" in error_of(tmp_path, "--output", out)
    uneven = error_of(run, "--output", out, "--steps", "3")
    assert "--steps 3 does not divide the 4 steps that the student is for" in uneven
    assert "is there already: name another" in error_of(run, "--output", tmp_path / "there")
    damaged = moved / "checkpoints" / "step_0000004"
    assert "step_0000004 is damaged" in error_of(damaged, "--output", out)
    assert "name its folder with --pretrained_model" in error_of(moved, "--output", out)
    nowhere = tmp_path / "there" / "file"
    nowhere.write_text("")
    assert f"--output {nowhere} is a file" in error_of(run, "--output", nowhere / "out")
    assert not out.exists()
    assert export.main([str(moved), "--pretrained_model", BASE, "--output", str(out)]) == 0
    assert read_card(out).iteration == 2  # the newest that is whole


@pytest.mark.parametrize("form", ["component", "pipeline"])
def test_a_disk_that_is_too_small_is_said_and_nothing_is_left(
    finished, tmp_path, capsys, monkeypatch, form
):
    with small_disk(tmp_path / "disk", "400k") as disk:
        words = [str(finished), "--form", form, "--output", str(disk / "out")]
        capsys.readouterr()
        assert export.main(words) == 2
        said = capsys.readouterr().err
        assert f"--output {disk}: " in said and "are to be written and 4" in said  # 400 KiB
        monkeypatch.setattr(folders, "require_room", lambda *args: None)  # another one filled it
        assert export.main(words) == 2
        full = capsys.readouterr().err
        assert f"writing {disk / 'out'} failed" in full and "No space left on device" in full
        assert said.count("\n") == full.count("\n") == 1 and list(disk.iterdir()) == []


def test_help_is_light_and_shows_an_example():
    heavy = "print(*sys.modules, file=sys.stderr)"
    code = (
        f"import atexit, sys; atexit.register(lambda: {heavy})\n"
        "from senseflow.export.__main__ import main"
    )
    result = subprocess.run(
        [sys.executable, "-c", f"{code}\nmain(['--help'])"], capture_output=True, text=True
    )
    assert result.returncode == 0
    assert "torch" not in result.stderr.split()
    assert "python -m senseflow.export runs/flux --output" in result.stdout


def test_sampling_takes_the_average(finished, tmp_path):
    step = finished / "ema" / "step_0000004"
    for path in (finished, finished / "checkpoints" / "step_0000004", step, step.parent):
        assert find_student(path, ema=True).weights == step / WEIGHTS
    with pytest.raises(ValueError, match="is no EMA; --ema takes a run trained with"):
        find_student(finished / "student" / "step_0000004", ema=True)
    words = ["--flux_ckpt", BASE, "--prompt", "a red seven", "--output_dir", str(tmp_path / "out")]
    line = [PYTHON, "scripts_flux/test_flux_senseflow.py", *words, "--ema"]
    result = subprocess.run(
        [*line, "--checkpoint", str(finished)], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert f"weights: {step / WEIGHTS}" in result.stderr


@pytest.mark.long
def test_resume_with_an_average_and_background_saves_is_bit_identical(data, finished, tmp_path):
    """Also off and on again: off ignores the average, on starts it from the student."""
    assert train(data, tmp_path / "r", "train.iter_num=2").returncode == 0
    result = train(data, tmp_path / "r")
    assert result.returncode == 0, result.stderr
    for file in sorted(p.relative_to(finished) for p in finished.glob("*/step_*/*")):
        if file.parts[0] != "samples" and file.suffix in (".safetensors", ".distcp"):
            assert (tmp_path / "r" / file).read_bytes() == (finished / file).read_bytes(), file
    result = train(data, tmp_path / "r", "ema.decay=null", "train.iter_num=6", gpus=1)
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "r" / "ema" / "step_0000006").exists()
    status, said = command(tmp_path / "r", "--ema", "--output", tmp_path / "out")
    assert status == 2 and "holds no EMA" in said
    result = train(data, tmp_path / "r", "train.iter_num=8", gpus=1)
    assert result.returncode == 0 and "holds no EMA: it starts from the student" in result.stderr
