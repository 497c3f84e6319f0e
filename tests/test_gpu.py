"""What only a GPU can show: NCCL, CUDA and the recipes in their own precision, through the scripts.

Every test runs its own processes; the rest of the suite does not see the GPU (conftest.py).
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from embedded import EMBEDDED, YAMLS
from gpus import NUM_GPUS, VISIBLE

from senseflow.config.config import load_config
from senseflow.tiny.pictures import write_dataset
from test_training import full_state, rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(NUM_GPUS == 0, reason="needs a GPU"),
]

SHORT = [
    "train.iter_num=6",
    "train.batch_size=4",
    "train.save_interval=3",
    "train.log_interval=1",
    "train.keep_last=0",
    "log.sample_interval=3",
    "lr_scheduler.warmup_iterations=0",
    "lr_scheduler.decay_iterations=0",
    "precision.compute=bfloat16",
]
ENVIRONMENT = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
if VISIBLE is None:
    ENVIRONMENT.pop("CUDA_VISIBLE_DEVICES", None)
else:
    ENVIRONMENT["CUDA_VISIBLE_DEVICES"] = VISIBLE


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder, num=24, seed=0, num_prompts=4)
    return folder / "data.json"


def command(name: str, data: Path, folder: Path, *overrides: str, gpus: int = 1) -> list[str]:
    words = ["sh", EMBEDDED[name].script, "1", str(gpus), YAMLS[name], str(folder)]
    return [*words, f"paths.dataset={data}", *SHORT, *overrides]


def train(name: str, data: Path, folder: Path, *overrides: str, gpus: int = 1) -> str:
    result = run(command(name, data, folder, *overrides, gpus=gpus))
    assert result.returncode == 0, result.stderr
    return result.stderr


def run(words: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(words, capture_output=True, text=True, env=ENVIRONMENT, timeout=900)


def states_that_differ(one: Path, other: Path, tmp_path: Path, iteration: int = 6) -> list[str]:
    first, second = (full_state(folder, iteration, tmp_path) for folder in (one, other))
    assert first.keys() == second.keys()
    return [key for key in first if not torch.equal(first[key], second[key])]


@pytest.mark.parametrize("name", EMBEDDED)
def test_a_recipe_trains_on_the_device_and_its_student_is_sampled(name, data, tmp_path):
    folder = tmp_path / "run"
    train(name, data, folder)
    row = rows(folder)[-1]
    assert row["mem_gib"] > 0 and row["time_s/generator"] > 0
    assert all(value - value == 0 for value in row.values())
    base = load_config(YAMLS[name]).paths.pretrained_model
    recipe = EMBEDDED[name]
    words = [
        recipe.draws,
        recipe.family.base_flag,
        base,
        "--checkpoint",
        folder,
        "--output_dir",
        tmp_path / "out",
    ]
    result = run([sys.executable, *map(str, words), "--prompt", "a red seven on white"])
    assert result.returncode == 0, result.stderr
    assert len(list((tmp_path / "out").glob("*.json"))) == 1


@pytest.mark.parametrize("name", ["flux_senseflow", "sdxl_dmd2"])
def test_resume_is_bit_identical_when_deterministic(name, data, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings = ["train.deterministic=true"]
    train(name, data, whole, *settings)
    train(name, data, parts, *settings, "train.iter_num=3")
    assert "going on from" in train(name, data, parts, *settings)
    assert states_that_differ(whole, parts, tmp_path) == []


def test_the_device_computes_what_the_host_does(data, tmp_path):
    """Losses of the first iterations in float32, before rounding has had time to grow."""
    settings = ["precision.compute=float32", "train.deterministic=true", "train.iter_num=2"]
    train("flux_senseflow", data, tmp_path / "gpu", *settings)
    words = command("flux_senseflow", data, tmp_path / "cpu", *settings)
    on_host = {**ENVIRONMENT, "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(words, check=True, capture_output=True, env=on_host, timeout=900)
    for ours, theirs in zip(rows(tmp_path / "gpu"), rows(tmp_path / "cpu"), strict=True):
        losses = {key: value for key, value in theirs.items() if key.startswith("loss/")}
        assert losses and {key: ours[key] for key in losses} == pytest.approx(losses, rel=2e-2)


def test_an_asynchronous_checkpoint_holds_the_bits_of_a_synchronous_one(data, tmp_path):
    settings = ["train.deterministic=true", "train.save_interval=1"]
    for name, asked in (("now", "false"), ("later", "true")):
        train("flux_senseflow", data, tmp_path / name, *settings, f"train.async_save={asked}")
    for iteration in (2, 6):
        assert states_that_differ(tmp_path / "now", tmp_path / "later", tmp_path, iteration) == []


def test_recomputing_activations_saves_memory(data, tmp_path):
    peaks = {}
    for every in (0, 1):
        folder = tmp_path / str(every)
        setting = f"parallel.activation_checkpointing={every}"
        train("flux_senseflow", data, folder, setting, "train.batch_size=64", "train.iter_num=2")
        peaks[every] = max(row["mem_gib"] for row in rows(folder))
    assert peaks[1] < peaks[0]


SMALLER = {
    "masters and moments": ["precision.masters=bfloat16", "optimizer.states=bfloat16"],
    "8 bits": ["precision.masters=bfloat16", "optimizer.states=8bit"],
    "in host memory": ["parallel.offload=trained"],
    "heads in host memory": ["parallel.offload=heads"],
    "all at once": [
        "precision.masters=bfloat16",
        "optimizer.states=8bit",
        "parallel.offload=trained",
        "ema.decay=0.9",
        "train.async_save=true",
    ],
}


@pytest.mark.parametrize("name", SMALLER)
def test_a_smaller_optimizer_trains_and_resumes_to_the_same_bits(name, data, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings = [*SMALLER[name], "train.deterministic=true"]
    train("flux_senseflow", data, whole, *settings)
    train("flux_senseflow", data, parts, *settings, "train.iter_num=3")
    train("flux_senseflow", data, parts, *settings)
    assert states_that_differ(whole, parts, tmp_path) == []


def test_shards_in_host_memory_take_the_same_steps(data, tmp_path):
    settings = ["precision.compute=float32", "train.deterministic=true", "train.iter_num=4"]
    places = ("none", "trained", "heads")
    for place in places:
        folder = tmp_path / place
        train("flux_senseflow", data, folder, *settings, f"parallel.offload={place}")
    for theirs, *others in zip(*(rows(tmp_path / place) for place in places), strict=True):
        losses = {key: value for key, value in theirs.items() if key.startswith("loss/")}
        for ours in others:
            assert losses and {k: ours[k] for k in losses} == pytest.approx(losses, rel=1e-2)


def test_a_signal_saves_and_ends_the_run(data, tmp_path):
    words = command("flux_senseflow", data, tmp_path, "train.iter_num=100000")
    process = subprocess.Popen(words, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 600
    while not (tmp_path / "stats.jsonl").exists() and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.2)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=300) == 0, process.stderr.read()
    done = int((tmp_path / "last_iter").read_text())
    assert (tmp_path / "checkpoints" / f"step_{done:07d}" / "manifest.json").exists()


@pytest.mark.skipif(NUM_GPUS < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", EMBEDDED)
def test_two_devices_compute_what_one_does(name, data, tmp_path):
    settings = ["precision.compute=float32", "train.deterministic=true", "train.iter_num=2"]
    for gpus in (1, 2):
        train(name, data, tmp_path / str(gpus), *settings, gpus=gpus)
    for ours, theirs in zip(rows(tmp_path / "2"), rows(tmp_path / "1"), strict=True):
        losses = {key: value for key, value in theirs.items() if key.startswith("loss/")}
        assert losses and {key: ours[key] for key in losses} == pytest.approx(losses, rel=1e-3)


@pytest.mark.skipif(NUM_GPUS < 2, reason="needs two GPUs")
def test_a_killed_rank_ends_the_other_within_a_minute(data, tmp_path):
    words = command("flux_senseflow", data, tmp_path, "train.iter_num=100000", gpus=2)
    process = subprocess.Popen(words, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "stats.jsonl").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.2)
    listed = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
    )
    os.kill(int(listed.stdout.split()[-1]), signal.SIGKILL)
    assert process.wait(timeout=60) != 0
    assert "SIGKILL" in process.stderr.read()
