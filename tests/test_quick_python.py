"""PYTHON (tests/parts/quick_python.py) does what Python does with the same command line."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from python import PYTHON

PRINTS_ALL = """
import json, os, sys
print(json.dumps([sys.argv[1:], os.getcwd(), os.environ.get("MARK"), sys.stdin.read(), __name__]))
"""


@pytest.fixture(autouse=True)
def quick():
    assert sys.executable != PYTHON


def run(python: str, *words: object, **changes: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [python, *map(str, words)], capture_output=True, text=True, timeout=120, **changes
    )


@pytest.mark.parametrize("kind", ["-c", "-m", "file"])
def test_the_process_is_that_of_the_caller(tmp_path, kind):
    (tmp_path / "prints_all.py").write_text(PRINTS_ALL)
    line = {"-c": [PRINTS_ALL], "-m": ["prints_all"], "file": []}[kind]
    words = [*([kind, *line] if line else ["prints_all.py"]), "a", "b c"]
    around = dict(cwd=tmp_path, input="in", env={**os.environ, "MARK": "x"})
    own, other = run(PYTHON, *words, **around), run(sys.executable, *words, **around)
    assert own.stdout == other.stdout and own.stdout.count("prints_all") == 0
    assert "b c" in own.stdout and str(tmp_path) in own.stdout and own.returncode == 0


@pytest.mark.parametrize(
    "code",
    [
        "import sys; sys.exit(3)",
        "import sys; sys.exit('a line')",
        "raise ValueError('bad')",
        "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "import os, signal; os.kill(os.getpid(), signal.SIGINT)",
        "import atexit; atexit.register(print, 'last')",
        "import threading as t, time; t.Thread(target=lambda: [time.sleep(.1), print(1)]).start()",
        "import os, sys; sys.stderr.write('at once'); os._exit(1)",
    ],
)
def test_it_ends_as_python_ends(code):
    own, other = run(PYTHON, "-c", code), run(sys.executable, "-c", code)
    assert (own.returncode, own.stdout) == (other.returncode, other.stdout)
    assert own.stderr.splitlines()[-1:] == other.stderr.splitlines()[-1:]


def test_options_that_change_nothing_cost_no_start():
    code = "import sys; print('senseflow.launch.worker' in sys.modules)"
    assert run(PYTHON, "-B", "-u", "-c", code).stdout == "True\n"
    assert run(PYTHON, "-O", "-c", code).stdout == "False\n"  # Python itself


def sleeper() -> tuple[subprocess.Popen[str], int]:
    """A process that sleeps and says which signal woke it, and its own id."""
    code = (
        "import os, signal, time\n"
        "signal.signal(signal.SIGUSR1, lambda number, frame: print('woken', flush=True))\n"
        "print(os.getpid(), flush=True)\n"
        "time.sleep(60)"
    )
    process = subprocess.Popen([PYTHON, "-c", code], stdout=subprocess.PIPE, text=True)
    return process, int(process.stdout.readline())


def test_signals_are_passed_on_and_its_death_is_the_processs_too():
    process, pid = sleeper()
    process.send_signal(signal.SIGUSR1)
    assert process.stdout.readline() == "woken\n"
    process.kill()
    assert process.wait() == -signal.SIGKILL
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_package_elsewhere_on_the_path_is_the_one_that_runs(tmp_path):
    (tmp_path / "senseflow").mkdir()
    (tmp_path / "senseflow" / "__init__.py").write_text("print('another')")
    assert run(PYTHON, "-c", "import senseflow", cwd=tmp_path).stdout == "another\n"
