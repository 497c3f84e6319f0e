"""Stop requests: none is lost and none is deadly, from the start of a process to its end."""

import subprocess
import sys
import time

import pytest

from senseflow.common.signals import STARTED, StopRequest

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
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "time.sleep(0.5)\n"
        "worker = ('import time; time.sleep(1); '\n"
        "  'from senseflow.common.signals import StopRequest; print(StopRequest().reason)')\n"
        "code = subprocess.run([sys.executable, '-c', worker]).returncode\n"
        "print(code, forwarder.reason)"
    )
    assert (result.returncode, result.stdout) == (0, "SIGTERM\n0 SIGTERM\n"), result.stderr


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
