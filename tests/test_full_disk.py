"""Real full and read-only disks under the shell script and the log. Mounting needs root."""

import os
import subprocess
from pathlib import Path

import pytest
from python import PYTHON
from small_disk import fill, grow, read_only, small_disk

from senseflow.common.ranks import start_ranks
from senseflow.engine.checkpoint import Checkpoints
from senseflow.engine.log import Log
from senseflow.tiny.pictures import write_dataset

CONFIG = "configs/FLUX/flux_senseflow_tiny.yaml"
SETTINGS = [
    "train.iter_num=2",
    "train.batch_size=4",
    "train.save_interval=1",
    "train.log_interval=1",
    "train.keep_last=0",
    "log.sample_interval=1",
    "lr_scheduler.warmup_iterations=0",
    "lr_scheduler.decay_iterations=0",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder, num=24, seed=0, num_prompts=4)
    return folder / "data.json"


def train(data: Path, folder: Path, *overrides: str) -> subprocess.CompletedProcess:
    words = ["sh", "exp_flux/train_flux_senseflow.sh", "1", "2", CONFIG, str(folder)]
    environment = {**os.environ, "PYTHON": PYTHON, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*words, f"paths.dataset={data}", *SETTINGS, *overrides],
        capture_output=True, text=True, env=environment, timeout=600,
    )  # fmt: skip


def errors_of(result: subprocess.CompletedProcess) -> list[str]:
    """The lines of a failed run's stderr but those of what it reads and of the progress bar."""
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr and "Exception ignored" not in result.stderr
    lines = result.stderr.replace("\r", "\n").splitlines()
    passed = ("reading ", "iteration ")
    lines = [line for line in lines if line.strip() and not line.startswith(passed)]
    return [line for line in lines if "it/s" not in line and "s/it" not in line]


@pytest.mark.long
@pytest.mark.parametrize("background", [False, True])
def test_a_run_on_a_full_disk_stops_in_one_line_and_goes_on_when_there_is_room(
    data, tmp_path, background
):
    setting = f"train.async_save={str(background).lower()}"
    with small_disk(tmp_path / "small", "90m") as disk:  # a checkpoint is 56 MB
        *said, error = errors_of(train(data, disk / "run", setting))
        step = disk / "run" / "checkpoints" / "step_0000002"
        full = f"writing {step} failed: [Errno 28] No space left on device"
        assert error.startswith(f"error: {full}")
        assert [line.startswith(full) for line in said] == [True] * background  # when it happened
        assert [p.name for p in step.parent.iterdir()] == ["step_0000001"]
        assert Checkpoints(disk / "run", 0, start_ranks()).newest()[0] == 1
        grow(disk, "400m")
        result = train(data, disk / "run", setting)
        assert result.returncode == 0, result.stderr
        assert "going on from" in result.stderr and step.is_dir()


@pytest.mark.long
def test_a_full_disk_under_the_students_export(data, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    with small_disk(run / "student", "1m") as disk:  # a student is 2.4 MB
        (error,) = errors_of(train(data, run))
        step = disk / "step_0000001"
        assert error.startswith(f"error: writing {step} failed: ") and "No space left" in error
        assert not list(disk.iterdir())
        assert Checkpoints(run, 0, start_ranks()).newest()[0] == 1


def test_a_run_folder_that_cannot_be_written_is_said_before_anything_is_loaded(data, tmp_path):
    with read_only(tmp_path / "disk") as disk:
        (error, *rest) = errors_of(train(data, disk / "run"))
    assert error.startswith(f"error: SAVE_DIR {disk / 'run'} cannot be written: [Errno 30] Read-on")
    assert not rest


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("tensorboard, where", [(False, "stats.jsonl"), (True, "tensorboard")])
def test_a_full_disk_under_the_log(tmp_path, tensorboard, where):
    with small_disk(tmp_path / "small", "1m") as disk:
        log = Log(disk, tensorboard)
        log.write(1, {"loss": 1.0})
        fill(disk)
        with pytest.raises(OSError, match=rf"writing .*{where} failed: .*No space left"):
            for iteration in range(2, 2000):
                log.write(iteration, {f"loss/{i}": 1.0 for i in range(30)})
