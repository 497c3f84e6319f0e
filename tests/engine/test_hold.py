"""Who holds a run folder: locks, beats, processes that are gone, folders that are removed."""

import errno
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from training_runs import environment, line

from senseflow.engine import hold
from senseflow.engine.hold import HOLD, Hold, holder_of, require_free, this_process


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(hold, "BEAT_S", 0.05)
    monkeypatch.setattr(hold, "SILENT_S", 1.0)
    monkeypatch.setattr(hold, "TOGETHER_S", 0.05)


def hold_of(folder: Path, lost: Callable[[str], None] = pytest.fail) -> Hold:
    folder.mkdir(exist_ok=True)
    return Hold(folder, None, lambda: False, lost)


@contextmanager
def holding(folder: Path, launcher: bool = False) -> Iterator[int]:
    """Another process that holds the folder, a fork; with `launcher` a fork of one that has ended.

    It is killed at the end.
    """
    told, tell = os.pipe()

    def begin(parent: int | None) -> None:
        Hold(folder, parent, lambda: False, lambda reason: os._exit(3)).take()
        os.write(tell, os.getpid().to_bytes(4, "little"))
        signal.pause()

    child = os.fork()
    if child == 0:
        try:
            if not launcher:
                begin(None)
            elif os.fork() == 0:
                begin(os.getppid())
            else:
                signal.pause()
        finally:
            os._exit(1)
    pid = int.from_bytes(os.read(told, 4), "little")
    if launcher:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    try:
        yield pid
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        if not launcher:
            os.waitpid(pid, 0)


def named(folder: Path) -> hold.Holder | None:
    with (folder / HOLD).open("rb") as stream:
        return holder_of(stream.fileno())


def test_a_folder_is_held_and_let_go(tmp_path):
    with hold_of(tmp_path) as held:
        held.take()
        assert named(tmp_path).pid == os.getpid()
        first = (tmp_path / HOLD).stat().st_mtime_ns
        while (tmp_path / HOLD).stat().st_mtime_ns == first:  # it beats
            time.sleep(0.02)
    assert list(tmp_path.iterdir()) == []
    with hold_of(tmp_path) as held:  # a run that was refused before lets nothing go
        pass


def test_a_second_run_is_refused_and_told_by_whom(tmp_path):
    with holding(tmp_path) as pid:
        with hold_of(tmp_path) as second, pytest.raises(OSError) as error:
            second.take()
        with pytest.raises(ValueError) as at_once:
            require_free(tmp_path)
        assert named(tmp_path).pid == pid  # and the first one still is
    said = str(error.value)
    assert said == str(at_once.value) and "\n" not in said
    assert f"SAVE_DIR {tmp_path} is in use" in said
    assert f"process {pid} on host {os.uname().nodename}, since 20" in said


def test_a_hold_that_a_killed_process_left_is_stale(tmp_path):
    with holding(tmp_path):
        pass
    assert named(tmp_path)
    require_free(tmp_path)
    with hold_of(tmp_path) as held:
        began = time.monotonic()
        held.take()  # at once: no sign of life is waited for
        assert time.monotonic() - began < hold.SILENT_S
        assert named(tmp_path).pid == os.getpid()


def test_a_run_without_its_launcher_is_waited_for(tmp_path, caplog):
    """It saves and ends by itself: the same command, run again, does not fail because of it."""
    caplog.set_level("INFO")
    with hold_of(tmp_path) as held, holding(tmp_path, launcher=True) as pid:
        require_free(tmp_path)
        thread = threading.Thread(target=held.take)
        thread.start()
        time.sleep(0.5)
        assert thread.is_alive() and named(tmp_path).pid == pid
        os.kill(pid, signal.SIGKILL)
        thread.join(10)
        assert named(tmp_path).pid == os.getpid()
    assert f"was last held by process {pid}" in caplog.text


def test_of_many_that_start_at_once_one_is_alone(tmp_path):
    held = [hold_of(tmp_path) for _ in range(6)]
    refused: list[str] = []

    def start(one: Hold) -> None:
        try:
            one.take()
        except OSError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=start, args=(one,)) for one in held]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert [one.descriptor is None for one in held].count(False) == 1
    assert len(refused) == 5 and all("in use by another run" in words for words in refused)
    for one in held:
        one.__exit__()


def write_elsewhere(folder: Path) -> Path:
    """As a process of another machine, whose locks are not seen here, leaves it."""
    elsewhere = replace(this_process(None), boot="another", host="gpu7", pid=os.getpid())
    (folder / HOLD).write_text(json.dumps(asdict(elsewhere)))
    return folder / HOLD


def test_a_beat_from_another_machine_is_a_sign_of_life(tmp_path):
    file, ended = write_elsewhere(tmp_path), threading.Event()

    def beat() -> None:
        while not ended.wait(0.05):
            os.utime(file)

    thread = threading.Thread(target=beat)
    thread.start()
    with hold_of(tmp_path) as second, pytest.raises(OSError, match=r"in use by .* on host gpu7"):
        second.take()
    ended.set()
    thread.join()
    assert named(tmp_path).host == "gpu7"


def test_silence_from_another_machine_is_waited_for_and_said(tmp_path, caplog):
    caplog.set_level("INFO")
    write_elsewhere(tmp_path)
    with hold_of(tmp_path) as held:
        began = time.monotonic()
        held.take()
        assert time.monotonic() - began >= hold.SILENT_S
        assert named(tmp_path).boot == hold.boot()
    assert caplog.text.count("was last held by process") == 1


def test_a_stop_request_ends_the_wait(tmp_path):
    write_elsewhere(tmp_path)
    held = Hold(tmp_path, None, lambda: True, pytest.fail)
    with held, pytest.raises(OSError, match="stopped while another run held"):
        held.take()


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def flock(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(hold.fcntl, "flock", flock)
    with hold_of(tmp_path) as held:
        held.take()
        with hold_of(tmp_path) as second, pytest.raises(OSError, match="in use by another run"):
            second.take()
    with hold_of(tmp_path) as held:  # and two at once: the last one to write stays
        monkeypatch.setattr(hold.time, "sleep", lambda seconds: write_elsewhere(tmp_path))
        with pytest.raises(OSError, match=r"in use by another run \(process .* on host gpu7"):
            held.take()


def test_a_folder_that_is_removed_under_the_run_is_made_again_and_held(tmp_path, caplog):
    folder = tmp_path / "run"
    with hold_of(folder) as held:
        held.take()
        shutil.rmtree(folder)
        while not (folder / HOLD).exists() or named(folder) is None:
            time.sleep(0.02)
        with hold_of(folder) as second, pytest.raises(OSError, match="in use by another run"):
            second.take()
    assert caplog.text.count("was removed under the run") == 1
    assert list(folder.iterdir()) == []


def test_a_run_whose_folder_another_one_took_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(hold, "BEAT_S", 0.5)  # time for the other
    reasons: list[str] = []
    folder, lost = tmp_path / "run", threading.Event()

    def note(reason: str) -> None:
        reasons.append(reason)
        lost.set()

    first = hold_of(folder, note)
    with first:
        first.take()
        shutil.rmtree(folder)
        folder.mkdir()
        with holding(folder) as pid:
            assert lost.wait(10)
            assert f"another run is in it now (process {pid} on" in reasons[0]
    assert named(folder).pid == pid


def test_the_command_is_refused_at_once(tmp_path):
    with holding(tmp_path) as pid:
        result = subprocess.run(
            line("flux_senseflow", tmp_path), capture_output=True, text=True, env=environment()
        )
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith(
        f"error: SAVE_DIR {tmp_path} is in use by another run (process {pid}"
    )
    assert result.stderr.count("\n") == 1
