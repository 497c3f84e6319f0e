"""Stop requests: none is lost and none is deadly, from the start of a process to its end."""

import os
import select
import signal
import subprocess
import sys
import time

import pytest

from senseflow.common import signals
from senseflow.common.files import ROOT
from senseflow.common.signals import STARTED, StopRequest, signal_at_end_of

HOUR = 3600.0


def run(program: str) -> subprocess.CompletedProcess:
    """In a process of its own: signals are a whole process's."""
    words = [sys.executable, "-c", program]
    return subprocess.run(words, capture_output=True, text=True, timeout=60)


@pytest.fixture
def request_at(monkeypatch):
    """A StopRequest without handlers, on the clock alone."""
    monkeypatch.setattr("signal.signal", lambda number, handler: None)
    monkeypatch.setattr("atexit.register", lambda function: None)

    def made(time_limit_s: float | None, since_s: float) -> StopRequest:
        """As long after the launcher's start."""
        monkeypatch.setenv(STARTED, str(time.monotonic() - since_s))
        stop = StopRequest()
        stop.time_limit_s = time_limit_s
        return stop

    return made


def test_a_signal_that_came_before_the_handlers_is_taken_up():
    result = run(
        "import os, signal\n"
        "from senseflow.common.signals import STOP_SIGNALS, StopRequest\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)\n"
        "os.kill(os.getpid(), signal.SIGUSR1)\n"
        "print(StopRequest().reason)"
    )
    assert (result.returncode, result.stdout) == (0, "SIGUSR1\n"), result.stderr


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_each_signal_is_a_reason_and_the_first_one_stays(name):
    result = run(
        "import os, signal\n"
        "from senseflow.common.signals import StopRequest\n"
        "stop = StopRequest()\n"
        "before = stop.reason\n"
        f"os.kill(os.getpid(), signal.{name})\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "print(before, stop.reason)"
    )
    assert (result.returncode, result.stdout) == (0, f"None {name}\n"), result.stderr


def test_a_signal_at_the_very_end_is_not_deadly():
    """Python takes its handlers away when it ends; what was registered first runs last."""
    result = run(
        "import atexit, os, signal\n"
        "from senseflow.common.signals import StopRequest\n"
        "class Last:\n"
        "    def __del__(self, kill=os.kill, pid=os.getpid()):\n"
        "        kill(pid, 15)\n"
        "import builtins\n"
        "builtins.last = Last()\n"
        "StopRequest()"
    )
    assert result.returncode == 0, result.stderr


def test_the_time_limit_counts_from_the_launch(request_at):
    assert request_at(2 * HOUR, since_s=2 * HOUR + 1).reason == "time limit of 2 h"
    assert request_at(2 * HOUR, since_s=2 * HOUR - 60).reason is None
    assert request_at(None, since_s=1000 * HOUR).reason is None
    assert request_at(0.5 * HOUR, since_s=HOUR).reason == "time limit of 0.5 h"


def test_the_time_limit_leaves_the_time_that_a_save_takes(request_at):
    stop = request_at(2 * HOUR, since_s=2 * HOUR - 60)
    stop.lead_s = 50
    assert stop.reason is None
    stop.lead_s = 70
    assert stop.reason == "time limit of 2 h"


def test_a_process_whose_launcher_is_gone_is_asked_to_stop():
    worker = (
        "import os, sys, time\n"
        "from senseflow.common.signals import StopRequest\n"
        "stop, launcher = StopRequest(), os.getppid()\n"
        "print(stop.reason, flush=True)\n"
        "os.write(int(sys.argv[1]), b'.')\n"
        "while os.getppid() == launcher: time.sleep(0.05)\n"
        "print(stop.reason)"
    )
    result = run(
        "import os, subprocess, sys\n"
        f"os.environ['{STARTED}'] = '0'\n"
        "read, write = os.pipe()\n"
        f"words = [sys.executable, '-c', {worker!r}, str(write)]\n"
        "subprocess.Popen(words, pass_fds=[write])\n"
        "os.read(read, 1)\n"
        "os._exit(0)"
    )
    assert result.stdout == "None\nthe end of its launcher\n", result.stderr


def test_the_launcher_passes_a_signal_on_to_a_worker_started_after_it():
    result = run(
        "import os, signal, subprocess, sys, time\n"
        "from senseflow.common.signals import Forwarder\n"
        "forwarder = Forwarder()\n"
        "forwarder.start()\n"
        "forwarder.forward()\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "time.sleep(0.5)\n"
        "worker = ('import time; time.sleep(1); '\n"
        "  'from senseflow.common.signals import StopRequest; print(StopRequest().reason)')\n"
        "code = subprocess.run([sys.executable, '-c', worker]).returncode\n"
        "print(code, forwarder.reason)"
    )
    assert (result.returncode, result.stdout) == (0, "SIGTERM\n0 SIGTERM\n"), result.stderr


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_before_there_are_processes_ends_the_launcher_at_once(name):
    """Its main thread may be in an import, or in C++, for seconds."""
    result = run(
        "import logging, os, signal, threading, time\n"
        "logging.basicConfig(level=logging.INFO, format='%(message)s')\n"
        "from senseflow.common.signals import Forwarder\n"
        "Forwarder().start()\n"
        f"os.kill(os.getpid(), signal.{name})\n"
        "threading.Lock().acquire() and time.sleep(50)"
    )
    said = f"stopped by {name} before the processes were started\n"
    assert (result.returncode, result.stderr) == (0, said)


def ends_with_its_parent(late: bool) -> bool:
    """Whether a fork that asked for it dies when its parent is killed, if `late` before it asks."""
    read, write = os.pipe()
    parent = os.fork()
    if parent == 0:
        launcher = os.getpid()
        if os.fork() == 0:
            while late and os.getppid() == launcher:
                time.sleep(0.01)
            signal_at_end_of(launcher, signal.SIGKILL)
            os.write(write, b"asked")
            time.sleep(60)
            os._exit(1)
        time.sleep(0 if late else 60)
        os._exit(0)
    os.close(write)
    if not late:
        assert os.read(read, 5) == b"asked"
        os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    ready, _, _ = select.select([read], [], [], 20)
    ended = bool(ready) and os.read(read, 5) == b""  # nobody has the other end
    os.close(read)
    return ended


@pytest.mark.parametrize("late", [False, True])
def test_a_fork_ends_with_its_launcher_whenever_that_dies(late):
    assert ends_with_its_parent(late)


def test_in_training_the_end_of_the_launcher_is_a_request_to_save(monkeypatch):
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(
        signals, "signal_at_end_of", lambda parent, number: asked.append((parent, number))
    )
    stop = StopRequest.__new__(StopRequest)
    stop.launcher = 77
    stop.save_first()
    stop.launcher = None  # torchrun's alone: its agent does not end with a word
    stop.save_first()
    assert asked == [(77, signal.SIGINT)]


INTERRUPTS = """
import os, signal, sys
class Interrupting:
    def find_spec(name, *_):
        if name.startswith("senseflow.") and "__main__" in sys.modules:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupting)
"""


@pytest.mark.parametrize(
    "line",
    [
        "-m senseflow.trainer.trainer_flux_senseflow",
        "-m senseflow.cache",
        "-m senseflow.tiny.pictures",
        *(str(file) for file in sorted(ROOT.glob("scripts_*/test_*.py"))),
    ],
)
def test_ctrl_c_before_a_command_listens_ends_it_without_a_word(line, tmp_path):
    """At its first import of another module of ours."""
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTS)
    result = subprocess.run(
        [sys.executable, *line.split(), "--help"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}, capture_output=True, text=True,
    )  # fmt: skip
    assert (result.returncode, result.stdout, result.stderr) == (-signal.SIGINT, "", "")


def test_a_command_says_what_ctrl_c_leaves_and_the_library_hears_it_as_before():
    program = (
        "import sys; sys.argv = {argv}\n"
        "import os, signal\n"
        "from senseflow.common.commands import exit_status\n"
        "print(exit_status(lambda: os.kill(os.getpid(), signal.SIGINT), 'all is kept'))\n"
        "print(repr(signal.getsignal(signal.SIGINT)))"
    )
    for argv, after in ((["-m"], "SIG_DFL"), (["-c"], "default_int_handler")):
        result = run(program.format(argv=argv))
        assert result.stderr == "stopped: all is kept\n" and result.returncode == 0
        assert result.stdout.startswith("130\n") and after in result.stdout


def test_processes_started_under_the_block_hear_no_signal_and_the_block_ends():
    result = run(
        "import multiprocessing, signal, subprocess, sys\n"
        "from senseflow.common.signals import STOP_SIGNALS, stop_signals_blocked\n"
        "with stop_signals_blocked():\n"
        "    multiprocessing.get_context('spawn').Lock()\n"  # as DataLoader does first
        "    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1)'])\n"
        "for number in STOP_SIGNALS:\n"
        "    child.send_signal(number)\n"
        "print(child.wait(), signal.pthread_sigmask(signal.SIG_BLOCK, []))"
    )
    assert (result.returncode, result.stdout) == (0, "0 set()\n"), result.stderr
