"""Several processes and two hosts through the shell script: one run, and what may befall it."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from hosts import (
    node_environment,
    on_host,
    pull_cable,
    torchrun_environment,
    two_hosts,
)
from safetensors.torch import load_file
from training_runs import blind_teacher

from senseflow.tiny.pictures import write_dataset

pytestmark = pytest.mark.long

SHORT = [  # 6 iterations of 4 samples are one epoch of the 24
    "train.iter_num=6",
    "train.batch_size=4",
    "train.save_interval=2",
    "train.log_interval=2",
    "log.sample_interval=0",
    "lr_scheduler.warmup_iterations=0",
    "lr_scheduler.decay_iterations=0",
]
LONG = [*SHORT, "train.iter_num=10000", "train.save_interval=10000"]
UNREADABLE = range(0, 24, 3)  # no two in a row: each is met at its own place alone
AGAIN = "it goes on from the last complete checkpoint"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """24 pictures, every third of which cannot be read."""
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder, num=24, seed=0, num_prompts=4)
    paths = json.loads((folder / "data.json").read_text())["image_paths"]
    for i in UNREADABLE:
        (folder / paths[i]).write_bytes(b"no picture")
    return folder / "data.json"


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    try:
        with two_hosts() as names:
            yield names
    except PermissionError as error:
        pytest.skip(str(error))


class Node:
    """One launcher with all its processes, started as a user does."""

    def __init__(self, line: list[str], environment: dict[str, str], log: Path) -> None:
        self.log = log
        environment = {**environment, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
        with log.open("w") as stream:
            self.launcher = subprocess.Popen(line, env=environment, stderr=stream)

    @property
    def said(self) -> str:
        return self.log.read_text()

    @property
    def errors(self) -> list[str]:
        rows = self.said.replace("\r", "\n").splitlines()
        return [row for row in rows if "error" in row or "Traceback" in row]

    def workers(self) -> list[psutil.Process]:
        """In the order of their ranks."""
        children = psutil.Process(self.launcher.pid).children()
        return sorted(children, key=lambda child: child.pid)

    def end(self, seconds: float) -> int:
        """The exit code; raises TimeoutExpired when the launcher lives longer."""
        return self.launcher.wait(seconds)


@pytest.fixture
def nodes(data, tmp_path) -> Iterator[Callable[..., list[Node]]]:
    """Starts a run; whatever is left of it afterwards is killed."""
    started: list[Node] = []

    def start(
        *overrides: str,
        hosts: tuple[str, ...] = (),
        gpus: int = 1,
        environment: Callable[[int], dict[str, str]] = node_environment,
    ) -> list[Node]:
        line = ["sh", "exp_flux/train_flux_senseflow.sh", str(len(hosts) or 1), str(gpus)]
        line += ["configs/FLUX/flux_senseflow_tiny.yaml", str(tmp_path / "run")]
        line += [f"paths.dataset={data}", *overrides]
        for i, host in enumerate(hosts or (None,)):
            words = on_host(host, line) if host else line
            started.append(Node(words, environment(i), tmp_path / f"node{i}.log"))
        return started

    yield start
    for node in started:
        with suppress(psutil.NoSuchProcess):
            for process in psutil.Process(node.launcher.pid).children(recursive=True):
                process.kill()
        node.launcher.kill()
        node.launcher.wait()


def wait_for(file: Path, run: list[Node], seconds: float = 400) -> None:
    deadline = time.monotonic() + seconds
    while not file.exists():
        for node in run:
            assert node.launcher.poll() is None, node.said
        assert time.monotonic() < deadline, [node.said for node in run]
        time.sleep(0.1)


def student(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "student/step_0000006/diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory) -> dict[str, torch.Tensor]:
    """The student of one node with two ranks."""
    folder = tmp_path_factory.mktemp("undisturbed")
    line = ["sh", "exp_flux/train_flux_senseflow.sh", "1", "2"]
    line += ["configs/FLUX/flux_senseflow_tiny.yaml", str(folder), f"paths.dataset={data}"]
    node = Node([*line, *SHORT], node_environment(0), folder / "log")
    assert node.end(600) == 0, node.said
    return student(folder)


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """To the bit: the ranks, their data and the order of gloo's sums are the same."""
    assert one.keys() == other.keys() and len(one) > 50
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


def test_two_hosts_train_one_student_and_read_every_sample_once(
    hosts, nodes, undisturbed, tmp_path
):
    run = nodes(*SHORT, hosts=hosts)
    for node in run:
        assert node.end(600) == 0, node.said
    assert_same(student(tmp_path / "run"), undisturbed)
    listed = [
        [
            line.split()[1]
            for line in node.said.replace("\r", "\n").splitlines()
            if "skipped" in line
        ]
        for node in run
    ]
    assert listed[0] and listed[1] and not set(listed[0]) & set(listed[1])
    assert len(listed[0]) + len(listed[1]) == len(UNREADABLE)


def test_a_rank_that_dies_ends_the_others_on_its_host_with_the_cause(nodes, tmp_path):
    run = nodes(*LONG, gpus=2)
    wait_for(tmp_path / "run" / "stats.jsonl", run)
    workers = run[0].workers()
    workers[1].kill()
    assert run[0].end(60) == 1
    (error,) = run[0].errors
    assert f"rank 1 (pid {workers[1].pid}, host " in error and AGAIN in error
    assert "was killed by SIGKILL (often: out of memory)" in error
    assert not any(worker.is_running() for worker in workers)


def test_a_rank_that_dies_ends_the_other_host_with_the_cause(hosts, nodes, tmp_path):
    run = nodes(*LONG, hosts=hosts)
    wait_for(tmp_path / "run" / "stats.jsonl", run)
    (victim,) = run[1].workers()
    victim.kill()
    began = time.monotonic()
    for node in run:
        assert node.end(60 - (time.monotonic() - began)) == 1
        (error,) = node.errors
        assert f"rank 1 (pid {victim.pid}, host " in error and "killed by SIGKILL" in error


def test_a_pulled_cable_ends_both_hosts(hosts, nodes, tmp_path):
    run = nodes(*LONG, hosts=hosts)
    wait_for(tmp_path / "run" / "stats.jsonl", run)
    pull_cable(hosts[1])
    began = time.monotonic()
    for node in run:
        assert node.end(75 - (time.monotonic() - began)) == 1
    (error,) = run[0].errors
    assert "rank 1 on host" in error and "its host or the network to it is gone" in error
    (error,) = run[1].errors
    assert "node 0 at 10.79.31.1:29533 cannot be reached any more" in error


def test_a_killed_rank_is_restarted_on_one_host(nodes, undisturbed, tmp_path):
    run = nodes(*SHORT, "--max-restarts", "1", gpus=2)
    wait_for(tmp_path / "run/checkpoints/step_0000002", run)
    run[0].workers()[0].kill()
    assert run[0].end(600) == 0, run[0].said
    assert "going on from" in run[0].said and "rank 0 (pid" in run[0].said
    assert_same(student(tmp_path / "run"), undisturbed)


def test_a_killed_rank_is_restarted_on_two_hosts(hosts, nodes, undisturbed, tmp_path):
    run = nodes("--max-restarts=1", *SHORT, hosts=hosts)
    wait_for(tmp_path / "run/checkpoints/step_0000002", run)
    run[1].workers()[0].kill()
    for node in run:
        assert node.end(600) == 0, node.said
        assert "rank 1 (pid" in node.said and "Restart 1 of 1" in node.said
    assert_same(student(tmp_path / "run"), undisturbed)


def checkpoints(folder: Path) -> list[str]:
    return [p.name for p in (folder / "checkpoints").iterdir()]


def test_slurms_warning_to_one_launcher_stops_both_hosts_with_one_checkpoint(
    hosts, nodes, tmp_path
):
    run = nodes(*LONG, hosts=hosts, environment=torchrun_environment)
    wait_for(tmp_path / "run" / "stats.jsonl", run)
    run[1].launcher.send_signal(signal.SIGUSR1)
    for node in run:
        assert node.end(120) == 0, node.said
        assert node.errors == []
    done = int((tmp_path / "run" / "last_iter").read_text())
    assert done >= 2 and checkpoints(tmp_path / "run") == [f"step_{done:07d}"]


def test_a_signal_to_any_one_rank_stops_all(nodes, tmp_path):
    run = nodes(*LONG, "--max-restarts=1", gpus=2)
    wait_for(tmp_path / "run" / "stats.jsonl", run)
    run[0].workers()[1].send_signal(signal.SIGTERM)
    assert run[0].end(120) == 0, run[0].said
    done = int((tmp_path / "run" / "last_iter").read_text())
    assert done >= 2 and checkpoints(tmp_path / "run") == [f"step_{done:07d}"]
    assert run[0].errors == [] and "Restart" not in run[0].said


@pytest.mark.parametrize("moment_s", [0.0, 6.0])
def test_a_signal_while_a_worker_starts_is_not_lost_nor_deadly(nodes, tmp_path, moment_s):
    run = nodes(*LONG, gpus=2)
    while len(run[0].workers()) < 2:
        time.sleep(0.05)
    time.sleep(moment_s)
    for worker in run[0].workers():
        worker.send_signal(signal.SIGTERM)
    assert run[0].end(300) == 0, run[0].said
    assert run[0].errors == []
    assert not (tmp_path / "run" / "checkpoints").exists() or checkpoints(tmp_path / "run")


def test_losses_that_are_not_finite_are_said_once_and_not_repeated(nodes, tmp_path):
    blind = f"paths.pretrained_model={blind_teacher(tmp_path / 'teacher')}"
    words = (blind, "train.save_interval=1", "train.max_skipped=0", "--max-restarts=3")
    run = nodes(*SHORT, *words, gpus=2)
    assert run[0].end(300) == 1
    (error,) = run[0].errors
    assert "not finite in iterations" in error and "Restart" not in run[0].said
