"""Whole runs on the embedded teacher: the shell script, resume, stops, and bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from PIL import Image
from python import PYTHON
from safetensors.torch import load_file
from short_runs import begin, configure, finish
from training_runs import blind_teacher, full_state, rows, timeless_rows

from senseflow.config.config import load_config
from senseflow.config.load import check_split
from senseflow.engine.build import check_networks
from senseflow.engine.inputs import read_run
from senseflow.launch.launch import check_devices
from senseflow.teachers.flux.family import FLUX
from senseflow.tiny.pictures import write_dataset

CONFIG = "configs/FLUX/flux_senseflow_tiny.yaml"
SHORT = [
    "train.iter_num=4",
    "train.batch_size=4",
    "train.save_interval=2",
    "train.log_interval=2",
    "train.keep_last=0",
    "log.sample_interval=2",
    "adversarial.taps=[5]",
    "lr_scheduler.warmup_iterations=0",
    "lr_scheduler.decay_iterations=0",
]


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A JSON data set of 24 embedded pictures."""
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder, num=24, seed=0, num_prompts=4)
    return folder / "data.json"


def command(data: Path, folder: Path, *overrides: str, gpus: int = 1) -> list[str]:
    """The line of the README, with a shorter run."""
    words = ["sh", "exp_flux/train_flux_senseflow.sh", "1", str(gpus), CONFIG, str(folder)]
    return [*words, f"paths.dataset={data}", *SHORT, *overrides]


def environment(python: str = PYTHON) -> dict[str, str]:
    return {**os.environ, "PYTHON": python, "OMP_NUM_THREADS": "1"}


def run(
    data: Path, folder: Path, *overrides: str, gpus: int = 1, python: str = PYTHON
) -> subprocess.CompletedProcess:
    line, variables = command(data, folder, *overrides, gpus=gpus), environment(python)
    return subprocess.run(line, capture_output=True, text=True, env=variables, timeout=600)


@pytest.fixture(scope="session")
def finished(data, tmp_path_factory) -> Path:
    """A run of four iterations through the shell script, by Python itself."""
    folder = tmp_path_factory.mktemp("finished")
    result = run(data, folder, python=sys.executable)
    assert result.returncode == 0, result.stderr
    return folder


def test_run_folder_holds_everything(finished):
    names = {p.name for p in finished.iterdir()}
    expected = {"config.yaml", "stats.jsonl", "tensorboard", "samples", "checkpoints", "student"}
    assert expected <= names and (finished / "last_iter").read_text() == "4\n"
    assert load_config(finished / "config.yaml").train.batch_size == 4
    row = rows(finished)[-1]
    for name in ("loss/dmd", "loss/isg", "loss/fake", "grad_norm/generator", "lr/generator"):
        assert name in row
    for name in ("ida/gap", "time_s/iteration", "time_s/generator", "time_s/fake_score"):
        assert row[name] > 0
    assert [r["iteration"] for r in rows(finished)] == [2, 4]


def test_strip_shows_what_the_iteration_computed(finished):
    with Image.open(finished / "samples" / "step_0000002.png") as strip:
        columns, height = strip.size[0] // 96, strip.size[1]
    assert columns in (6, 7) and height == 16 + 4 * 96  # with or without a clean input


def test_student_folder_loads_in_diffusers(finished):
    student = FluxTransformer2DModel.from_pretrained(finished / "student" / "step_0000004")
    assert not student.config.guidance_embeds
    card = json.loads((finished / "student" / "step_0000004" / "senseflow.json").read_text())
    assert card["anchors"] == pytest.approx([1, 0.9045, 0.7595, 0.5128], abs=1e-4)


def test_resume_is_bit_identical_to_the_uninterrupted_run(data, finished, tmp_path):
    assert run(data, tmp_path / "r", "train.iter_num=2").returncode == 0
    result = run(data, tmp_path / "r")
    assert result.returncode == 0 and "going on from" in result.stderr
    one, other = (full_state(f, 4, tmp_path) for f in (finished, tmp_path / "r"))
    assert one.keys() == other.keys() and len(one) > 500
    assert [k for k in one if not torch.equal(one[k], other[k])] == []
    assert timeless_rows(finished) == timeless_rows(tmp_path / "r")


def test_bf16_compute_keeps_float32_masters(data, tmp_path):
    folder = tmp_path / "bf16"
    bf16 = ("precision.compute=bfloat16", "train.iter_num=2", "train.log_interval=2")
    finish(begin(configure(data, *bf16), folder))
    state = full_state(folder, 2, tmp_path)
    floating = {k: v.dtype for k, v in state.items() if v.is_floating_point()}
    assert set(floating.values()) == {torch.float32}
    assert rows(folder)[-1]["ida/gap"] > 0
    student = folder / "student" / "step_0000002" / "diffusion_pytorch_model.safetensors"
    assert {v.dtype for v in load_file(student).values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)]
)
def test_a_signal_saves_a_checkpoint_and_ends_cleanly(data, tmp_path, number):
    line = command(data, tmp_path, "train.iter_num=1000", "train.save_interval=1000")
    process = subprocess.Popen(line, env=environment(), stderr=subprocess.PIPE, text=True)
    stats = tmp_path / "stats.jsonl"
    deadline = time.monotonic() + 300
    while not stats.exists() and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.2)
    process.send_signal(number)
    assert process.wait(timeout=120) == 0, process.stderr.read()
    done = int((tmp_path / "last_iter").read_text())
    assert done >= 2
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [f"step_{done:07d}"]
    assert rows(tmp_path)[-1]["iteration"] == done


@pytest.mark.long
def test_a_corrupt_checkpoint_is_passed_over(data, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "r")
    file = next((tmp_path / "r" / "checkpoints" / "step_0000004").glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-100])
    result = run(data, tmp_path / "r")
    assert result.returncode == 0, result.stderr
    assert "step_0000004 is damaged" in result.stderr
    assert "going on from" in result.stderr and "step_0000002" in result.stderr
    assert [r["iteration"] for r in rows(tmp_path / "r")] == [2, 4]


def test_steps_that_are_not_finite_stop_the_run_where_none_may_be_skipped(data, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "r")
    blind = f"paths.pretrained_model={blind_teacher(tmp_path / 'teacher')}"
    words = ("train.iter_num=8", "train.save_interval=1", "train.max_skipped=0")
    result = run(data, tmp_path / "r", blind, *words)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "not finite in iterations" in result.stderr and "loss/" in result.stderr
    assert f" is saved in {tmp_path / 'r' / 'checkpoints'}, without them" in result.stderr
    kept = sorted(p.name for p in (tmp_path / "r" / "checkpoints").iterdir())
    assert "step_0000004" <= kept[-1] < "step_0000008"


def test_bad_input_through_the_script_is_one_line(data, tmp_path):
    result = run(data, tmp_path / "x", "train.iter_nmu=4")
    assert result.returncode == 1 and not (tmp_path / "x").exists()
    assert result.stderr.count("\n") == 1
    assert "unknown key train.iter_nmu; the nearest valid key is train.iter_num" in result.stderr


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("paths.dataset=nowhere.json", "nowhere.json"),
        ("paths.pretrained_model=nowhere", "nowhere is not a diffusers pipeline folder"),
        ("paths.pretrained_model=assets/tiny/common/judge", "no model_index.json"),
        ("paths.student_config=nowhere/config.json", "nowhere/config.json not found"),
        ("paths.flux_wo_guidance_embed=nowhere", "nowhere/transformer/config.json not found"),
    ],
)
def test_bad_paths_are_found_before_anything_is_loaded(data, override, message):
    config = load_config(CONFIG, [f"paths.dataset={data}", override])
    with pytest.raises(ValueError, match=message):
        check_networks(read_run(config, FLUX))


def test_batch_must_divide_over_processes_and_micro_batches():
    config = load_config(CONFIG, ["train.batch_size=6", "train.grad_accumulation=2"])
    check_split(config, 3)
    with pytest.raises(ValueError, match=r"train.batch_size 6 is not a multiple of 2 processes x"):
        check_split(config, 2)
    with pytest.raises(ValueError, match="shuffled needs micro-batches of two"):
        check_split(
            load_config(CONFIG, ["train.batch_size=2", "adversarial.reference=shuffled"]), 2
        )


def test_every_process_needs_a_gpu_of_its_own_or_none():
    check_devices(2, 0)
    check_devices(2, 8)
    with pytest.raises(ValueError, match="GPUS 2: this node has 1"):
        check_devices(2, 1)


def test_trainer_modules_are_short():
    for trainer in Path("senseflow/trainer").glob("trainer_*.py"):
        assert len(trainer.read_text().splitlines()) < 20


def test_nothing_outside_tiny_asks_whether_a_teacher_is_tiny():
    for file in Path("senseflow").rglob("*.py"):
        if "tiny" not in file.parts:
            assert "tiny" not in file.read_text().lower(), file


def test_a_renamed_teacher_of_other_sizes_runs_the_same(flux_folder, data, tmp_path):
    """The random pipeline of the tests: other widths, depths and tokenizers, another name."""
    shutil.copytree(flux_folder, tmp_path / "my-finetune")
    overrides = [
        f"paths.pretrained_model={tmp_path / 'my-finetune'}",
        "train.iter_num=2",
        "data.max_sequence_length=8",
    ]
    finish(begin(configure(data, *overrides), tmp_path / "run"))
    assert (tmp_path / "run" / "student" / "step_0000002" / "config.json").exists()


def test_student_in_a_stock_pipeline_draws_the_images_of_our_script(finished, tmp_path):
    """The inference line of the README against FluxPipeline with the stock stochastic scheduler."""
    base, prompt = "assets/tiny/flux/pipeline", "a red seven left of a blue two on white"
    words = ["--flux_ckpt", base, "--checkpoint", str(finished), "--output_dir", str(tmp_path)]
    line = [PYTHON, "scripts_flux/test_flux_senseflow.py", *words, "--prompt", prompt]
    result = subprocess.run(line, capture_output=True, text=True, env=environment(), timeout=300)
    assert result.returncode == 0, result.stderr
    (file,) = [f for f in tmp_path.glob("*.png") if f.name != "grid.png"]

    student = FluxTransformer2DModel.from_pretrained(finished / "student" / "step_0000004")
    pipeline = FluxPipeline.from_pretrained(base, transformer=student)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(
        pipeline.scheduler.config, stochastic_sampling=True
    )
    torch.manual_seed(0)
    card = json.loads((finished / "student" / "step_0000004" / "senseflow.json").read_text())
    image = pipeline(
        prompt,
        height=32,
        width=32,
        num_inference_steps=4,
        max_sequence_length=card["max_sequence_length"],
    ).images[0]
    theirs = np.asarray(Image.open(file).convert("RGB"), np.int16)
    difference = np.abs(np.asarray(image, np.int16) - theirs)
    # Two processes: in one that has worked before, now and then a pixel is a level off.
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01


@pytest.mark.parametrize(
    ("how", "message", "last"),
    [
        ("configuration", "ranks disagree: the configuration (rank 0 unlike 1)", 0),
        pytest.param(
            "draws",
            "ranks disagree: the turn of iteration 5 (rank 0 unlike 1)",
            3,
            marks=pytest.mark.long,
        ),
    ],
)
def test_a_rank_unlike_the_others_is_an_error_and_no_hang(how, message, last, data, tmp_path):
    words = command(data, tmp_path / "run", "train.iter_num=20", "train.log_interval=1", gpus=2)
    line = [PYTHON, "-m", "odd_rank", *words[2:]]
    path = f"tests/parts:{os.environ.get('PYTHONPATH', '')}"
    variables = {**environment(), "ODD": how, "PYTHONPATH": path}
    result = subprocess.run(line, capture_output=True, text=True, env=variables, timeout=300)
    assert result.returncode == 1
    assert result.stderr.count(message) == 1, result.stderr
    done = rows(tmp_path / "run")[-1]["iteration"] if last else 0
    assert done == last
