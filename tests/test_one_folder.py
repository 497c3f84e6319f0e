"""Two runs in one folder, a launcher that is killed, a folder that is removed: by the script."""

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from training_runs import environment, line, rows

from senseflow.engine.hold import HOLD
from senseflow.tiny.pictures import write_dataset

pytestmark = pytest.mark.long

SETTINGS = (
    "train.batch_size=4",
    "train.save_interval=3",
    "train.log_interval=1",
    "adversarial.kind=none",
    "isg.weight=0",
    "log.sample_interval=0",
    "lr_scheduler.warmup_iterations=0",
    "lr_scheduler.decay_iterations=0",
)
Start = Callable[..., subprocess.Popen]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder, num=24, seed=0, num_prompts=4)
    return folder / "data.json"


@pytest.fixture
def start(data, tmp_path) -> Iterator[Start]:
    """Starts the script on two ranks for so many iterations in one run folder."""
    started: list[subprocess.Popen] = []

    def begin(iterations: int) -> subprocess.Popen:
        words = [f"paths.dataset={data}", f"train.iter_num={iterations}", *SETTINGS]
        process = subprocess.Popen(
            line("flux_senseflow", tmp_path / "run", *words, ranks=2),
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def wait_for(reached: Callable[[], bool], process: subprocess.Popen) -> None:
    end = time.monotonic() + 300
    while not reached():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.05)


def holder(run: Path) -> dict[str, int]:
    return json.loads((run / HOLD).read_text() or "{}")


def test_the_second_of_two_runs_is_refused_and_the_first_goes_on(start, tmp_path):
    run = tmp_path / "run"
    first = start(15)
    wait_for(lambda: bool(list((run / "checkpoints").glob("step_*"))), first)
    second = start(15)
    said = second.communicate(timeout=60)[1]
    assert second.returncode == 1 and said.count("\n") == 1
    assert f"in use by another run (process {holder(run)['pid']} on host" in said
    said = first.communicate(timeout=600)[1]
    assert first.returncode == 0, said
    assert [row["iteration"] for row in rows(run)] == list(range(1, 16))
    assert not (run / HOLD).exists()


def test_two_that_start_together_are_one(start, tmp_path):
    both = [start(3), start(3)]
    said = [process.communicate(timeout=600)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 1]
    assert sum("in use by another run" in words for words in said) == 1
    assert [row["iteration"] for row in rows(tmp_path / "run")] == [1, 2, 3]


@pytest.mark.parametrize("loading", [True, False])
def test_no_rank_outlives_a_launcher_that_is_killed(start, tmp_path, loading):
    """While they load they end at once; in training they save if they can; both let go."""
    run = tmp_path / "run"
    first = start(500)
    wait_for(lambda: (run / HOLD).exists() and bool(holder(run)), first)
    if not loading:
        wait_for(lambda: bool(list((run / "checkpoints").glob("step_*"))), first)
    launcher = psutil.Process(holder(run)["launcher"])
    ranks = launcher.children()
    assert len(ranks) == 2
    launcher.send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(ranks, timeout=60)
    assert not alive
    assert bool(list(run.glob("checkpoints/step_*"))) is not loading
    second = start(1)  # at once, and again in this folder
    assert second.wait(timeout=300) == 0, second.stderr.read()


def test_a_folder_that_is_removed_under_a_run_is_said_and_filled_again(start, tmp_path):
    run = tmp_path / "run"
    process = start(12)
    wait_for(lambda: (run / "stats.jsonl").exists(), process)
    shutil.rmtree(run)
    said = process.communicate(timeout=600)[1]
    assert process.returncode == 0, said
    assert said.count("was removed under the run") == 1
    assert (run / "checkpoints" / "step_0000012" / "manifest.json").exists()
    assert (run / "config.yaml").exists() and rows(run)[-1]["iteration"] == 12
    again = start(12)
    assert "nothing is left to train" in again.communicate(timeout=300)[1]
