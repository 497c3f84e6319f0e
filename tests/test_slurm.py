"""The Slurm examples under stand-ins for srun and scontrol: command lines, signals, requeueing."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from senseflow.config.recipes import RECIPES
from senseflow.tiny.pictures import write_dataset

EXAMPLES = {
    "exp_flux/slurm_flux.sbatch": "flux_senseflow",
    "exp_sdxl/slurm_sdxl.sbatch": "sdxl_senseflow",
    "exp_sd35/slurm_sd35.sbatch": "sd35_large_senseflow",
}

# As srun: the command on every node, and SIGUSR1 passed on to it.
SRUN = f"""#!{sys.executable}
import os, signal, subprocess, sys
nodes = [
    subprocess.Popen(sys.argv[1:], env=dict(os.environ, SLURM_NODEID=str(i)))
    for i in range(int(os.environ["SLURM_NNODES"]))
]
signal.signal(signal.SIGUSR1, lambda number, frame: [n.send_signal(number) for n in nodes])
sys.exit(max(node.wait() for node in nodes))
"""

SCONTROL = """#!/bin/sh
[ "$1" = requeue ] && echo "$2" >> "$STANDINS/requeued"
[ "$1" = show ] && printf 'first\\nsecond\\n'
exit 0
"""

# In training's place: notes what it was given, "trains" to LAST or until SIGUSR1.
PYTHON = """#!/bin/sh
echo "$MASTER_ADDR $MASTER_PORT $@" > "$STANDINS/node$NODE_RANK"
mkdir -p "$RUN"
printf 'train:\\n  iter_num: 10\\n  batch_size: 8\\n' > "$RUN/config.yaml"
trap '[ -z "$DONE" ] || echo "$DONE" > "$RUN/last_iter"; exit 0' USR1
[ -z "$LAST" ] || { echo "$LAST" > "$RUN/last_iter"; exit "$CODE"; }
while :; do sleep 0.1; done
"""


@pytest.fixture
def slurm(tmp_path) -> dict[str, str]:
    """The environment of a batch script on two nodes of four GPUs."""
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "python": PYTHON}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHON": str(tmp_path / "python"),
        "STANDINS": str(tmp_path),
        "RUN": str(tmp_path / "run"),
        "TEACHER": "/models/my teacher",
        "DATASET": "/data/data.json",
        "SLURM_JOB_ID": "123456",
        "SLURM_JOB_NODELIST": "gpu[1-2]",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "4",
        "LAST": "",
        "DONE": "7",
        "CODE": "0",
    }


@pytest.fixture
def jobs() -> Iterator[list[subprocess.Popen]]:
    """What a test has started; killed with all it started in turn."""
    started: list[subprocess.Popen] = []
    yield started
    for job in started:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()


def submit(example: str, environment: dict[str, str]) -> subprocess.Popen:
    return subprocess.Popen(["bash", example], env=environment, start_new_session=True)


def wait_for(file: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not file.exists():
        assert time.monotonic() < deadline, file
        time.sleep(0.1)


@pytest.mark.parametrize("example", EXAMPLES)
def test_every_node_runs_the_script_of_the_recipe(slurm, tmp_path, example):
    environment = {**slurm, "LAST": "10", "OVERRIDES": "train.seed=1 ida.lam=null"}
    assert submit(example, environment).wait(60) == 0
    for rank in (0, 1):
        words = (tmp_path / f"node{rank}").read_text().split(" -m ")
        assert words[0] == "first 23456"
        module, *line = words[1].split()
        script = Path(RECIPES[EXAMPLES[example]].script)
        assert f"-m {module} " in script.read_text()
        assert line[:2] == ["2", "4"] and Path(line[2]).is_file()
        assert line[3:] == [
            str(tmp_path / "run"),
            *("--max-restarts", "3", "paths.pretrained_model=/models/my", "teacher"),
            *("paths.dataset=/data/data.json", "train.seed=1", "ida.lam=null"),
        ]
    assert not (tmp_path / "requeued").exists()


@pytest.mark.parametrize("example", EXAMPLES)
def test_where_slurm_says_when_a_job_ends_the_run_has_a_limit_before_that(slurm, tmp_path, example):
    """Two hours less five minutes, of which the run takes the time of its last save; one's own
    comes after it."""
    times = {"SLURM_JOB_START_TIME": "1700000000", "SLURM_JOB_END_TIME": "1700007200"}
    environment = {**slurm, **times, "LAST": "10", "OVERRIDES": "train.time_limit=1"}
    assert submit(example, environment).wait(60) == 0
    words = (tmp_path / "node0").read_text().split()
    assert words[-2:] == ["train.time_limit=1.91667", "train.time_limit=1"]


@pytest.mark.parametrize("example", EXAMPLES)
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_preempted_job_saves_and_is_queued_again(slurm, jobs, tmp_path, example, number):
    jobs.append(submit(example, slurm))
    for rank in (0, 1):
        wait_for(tmp_path / f"node{rank}")
    time.sleep(0.3)
    jobs[0].send_signal(number)
    assert jobs[0].wait(60) == 0
    assert (tmp_path / "requeued").read_text() == "123456\n"


@pytest.mark.parametrize(("done", "queued"), [("", True), ("10", False)])
def test_a_job_asked_to_stop_is_queued_again_unless_it_had_finished(
    slurm, jobs, tmp_path, done, queued
):
    jobs.append(submit("exp_flux/slurm_flux.sbatch", {**slurm, "DONE": done}))
    for rank in (0, 1):
        wait_for(tmp_path / f"node{rank}")
    time.sleep(0.3)
    jobs[0].send_signal(signal.SIGUSR1)
    assert jobs[0].wait(60) == 0
    assert (tmp_path / "requeued").exists() == queued


@pytest.mark.parametrize(("last", "code"), [("10", "0"), ("4", "1")])
def test_a_finished_job_and_a_failed_one_are_not_queued_again(slurm, tmp_path, last, code):
    job = submit("exp_flux/slurm_flux.sbatch", {**slurm, "LAST": last, "CODE": code})
    assert job.wait(60) == int(code)
    assert not (tmp_path / "requeued").exists()


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_notes_to_slurm_agree_with_the_script(example):
    notes = dict(
        line.removeprefix("#SBATCH --").split("#")[0].strip().partition("=")[::2]
        for line in Path(example).read_text().splitlines()
        if line.startswith("#SBATCH")
    )
    assert notes["signal"].startswith("B:USR1@") and "requeue" in notes
    assert notes["ntasks-per-node"] == "1"


@pytest.mark.long
def test_the_embedded_teacher_through_the_example(slurm, jobs, tmp_path):
    write_dataset(tmp_path / "data", num=24, seed=0, num_prompts=4)
    environment = {
        **slurm,
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        "SLURM_NNODES": "1",
        "SLURM_GPUS_ON_NODE": "2",
        "CONFIG": "configs/FLUX/flux_senseflow_tiny.yaml",
        "TEACHER": "assets/tiny/flux/pipeline",
        "DATASET": str(tmp_path / "data" / "data.json"),
        "OVERRIDES": "train.batch_size=4 train.log_interval=1 train.iter_num=10000",
    }
    jobs.append(submit("exp_flux/slurm_flux.sbatch", environment))
    wait_for(tmp_path / "run" / "stats.jsonl", 400)
    jobs[0].send_signal(signal.SIGUSR1)
    assert jobs[0].wait(120) == 0
    assert (tmp_path / "requeued").read_text() == "123456\n"
    done = int((tmp_path / "run" / "last_iter").read_text())
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == [f"step_{done:07d}"]
