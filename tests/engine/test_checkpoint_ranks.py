"""Checkpoints on several ranks: in the background, agreed errors, other numbers of ranks."""

import functools
import os
import shutil
import subprocess
import time
from concurrent.futures import wait
from functools import partial
from pathlib import Path

import pytest
import torch
from python import PYTHON
from sharded import Check, assert_same, networks, spawn, step, values

from senseflow.common.ranks import Ranks, start_ranks
from senseflow.engine import checkpoint, disk
from senseflow.engine.checkpoint import Checkpoints
from senseflow.engine.disk import HostGroup, share_folder
from senseflow.optim.ema import Ema


@pytest.fixture(scope="module")
def alone() -> Ranks:
    """One rank, in this process."""
    return start_ranks()


def slowly(check: Check) -> Check:
    """With a disk so slow that training takes many steps during a save."""

    def slow_digest():
        time.sleep(0.3)
        return digest()

    digest = checkpoint.sha256  # of every file that is written

    @functools.wraps(check)
    def slow(ranks: Ranks, folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoint, "sha256", slow_digest)
            check(ranks, folder)

    return slow


@slowly
def background_state_is_that_of_the_call(ranks: Ranks, folder: Path) -> None:
    trained = networks(ranks, 0)
    ema = Ema.start(trained["generator"].network, 0.5)
    saves = Checkpoints(folder / "run", 0, ranks, asynchronous=True)
    seen = []
    with saves:
        kept = values(trained, ema)
        saves.save(1, trained, ema, lambda state: seen.append(sorted(state)))
        while not saves.pending.done():  # steps without collectives: ranks may take more or less
            move_alone(trained)
            time.sleep(0.01)
        move_alone(trained)
        assert not torch.equal(values(trained)["generator.1.bias"], kept["generator.1.bias"])
        later = values(trained, ema)
        saves.save(2, trained, ema)
        assert (saves.folder / "step_0000001").is_dir()  # a second save waits for the first
    assert seen == [["discriminator", "ema", "generator"]] and saves.pending is None
    for iteration, expected in ((1, kept), (2, later)):
        other = networks(ranks, 7)
        other_ema = Ema.start(other["generator"].network, 0.5)
        saves.load(saves.folder / f"step_{iteration:07d}", other, other_ema)
        assert_same(values(other, other_ema), expected)


def move_alone(trained) -> None:
    """Move this rank's shards in place, as an optimizer does."""
    with torch.no_grad():
        for part in trained.values():
            for parameter in part.network.parameters():
                parameter.to_local().add_(1)


@slowly
def training_goes_on_while_it_writes(ranks: Ranks, folder: Path) -> None:
    """Collectives of training and of the save, at the same time, in another order on each rank."""
    trained = networks(ranks, 0)
    with Checkpoints(folder / "busy", 2, ranks, asynchronous=True) as saves:
        for iteration in range(1, 5):
            kept = values(trained)
            saves.save(iteration, trained)
            time.sleep(0.1 * ranks.rank)
            step(trained, 20)
    assert sorted(p.name for p in saves.folder.iterdir()) == ["step_0000003", "step_0000004"]
    other = networks(ranks, 7)
    iteration, newest = saves.newest()
    saves.load(newest, other)
    assert iteration == 4
    assert_same(values(other), kept)


def failing(*args, **kwargs):
    raise OSError(28, "No space left on device")


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def errors_are_agreed(ranks: Ranks, folder: Path) -> None:
    """One rank alone fails, at each part of a save: all raise the same words, step 1 stays good."""
    trained = networks(ranks, 0)
    places = {
        (0, "empty_folder"), (0, "write_whole"), (0, "publish"), (1, "sha256"),
        (1, "DefaultSavePlanner.resolve_data"),
    }  # fmt: skip
    for background in (False, True):
        saves = Checkpoints(folder / f"run_{background}", 0, ranks, background)
        saves.save(1, trained)
        for rank, name in sorted(places):
            owner = dcp_planner() if "." in name else checkpoint
            name = name.rpartition(".")[2]
            saves.wait()
            with pytest.MonkeyPatch.context() as patch:
                if ranks.rank == rank:
                    patch.setattr(owner, name, failing)
                with pytest.raises(OSError, match=r"step_0000002 failed: .*No space left") as error:
                    saves.save(2, trained)
                    saves.wait()
            words = saves.host.gather(str(error.value))
            assert words[0] == words[1] and "\n" not in words[0], words
            assert saves.newest() == (1, saves.folder / "step_0000001")
            assert saves.host.on_main(partial(names_in, saves.folder)) == ["step_0000001"]
        with pytest.MonkeyPatch.context() as patch:
            if background:
                patch.setattr(checkpoint, "publish", failing)
            saves.save(2, trained)
            if saves.pending:
                wait([saves.pending])
        saves.save(3, trained)  # one that failed in the background costs nothing but itself
        assert saves.pending is None and saves.newest()[0] == 3


def dcp_planner() -> type:
    from torch.distributed.checkpoint import DefaultSavePlanner

    return DefaultSavePlanner


def stale_listings(ranks: Ranks, folder: Path) -> None:
    """Rank 1 does not see the newest folder in its listing, as on a network file system."""
    trained, saves = networks(ranks, 0), Checkpoints(folder / "run", 0, ranks)
    saves.save(1, trained)
    saves.save(2, trained)
    if ranks.rank == 1:
        checkpoint.complete_checkpoints = lambda folder: []
        checkpoint.read_manifest = lambda folder: {"damage": "not seen"}
    assert saves.newest() == (2, saves.folder / "step_0000002")


def folders_not_shared(ranks: Ranks, folder: Path) -> None:
    host = HostGroup(ranks)
    share_folder(folder / "run", host)
    assert host.on_main(partial(names_in, folder / "run")) == []
    with pytest.raises(OSError, match=r"SAVE_DIR .*mine_1 is not shared: .* all nodes mount"):
        share_folder(folder / f"mine_{ranks.rank}", host, within_s=0.5)


def saved_here_resumes_elsewhere(ranks: Ranks, folder: Path) -> None:
    trained = networks(ranks, 0)
    ema = Ema.start(trained["generator"].network, 0.5)
    step(trained, 2)
    ema.update(torch.ones(()))
    Checkpoints(folder, 0, ranks).save(3, trained, ema)
    expected = values(trained, ema)
    if ranks.is_main:
        torch.save(expected, folder / "expected.pt")


def saved_elsewhere_resumes_here(ranks: Ranks, folder: Path) -> None:
    other = networks(ranks, 9)
    ema = Ema.start(other["generator"].network, 0.5)
    saves = Checkpoints(folder, 0, ranks)
    saves.load(saves.newest()[1], other, ema)
    assert_same(values(other, ema), torch.load(folder / "expected.pt"))


def test_two_ranks(alone, tmp_path):
    (tmp_path / "saved_elsewhere_resumes_here").mkdir()
    saved_here_resumes_elsewhere(alone, tmp_path / "saved_elsewhere_resumes_here")
    spawn(
        2,
        tmp_path,
        background_state_is_that_of_the_call,
        training_goes_on_while_it_writes,
        errors_are_agreed,
        stale_listings,
        folders_not_shared,
        saved_elsewhere_resumes_here,
        saved_here_resumes_elsewhere,
    )
    saved_elsewhere_resumes_here(alone, tmp_path / "saved_here_resumes_elsewhere")


@pytest.mark.long
def test_saved_in_two_replicas_of_two_shards_resumes_on_one_rank(alone, tmp_path):
    spawn(4, tmp_path, saved_here_resumes_elsewhere, replicas=2)
    saved_elsewhere_resumes_here(alone, tmp_path / "saved_here_resumes_elsewhere")


class Killed(BaseException):
    """The process is gone: nothing handles it."""


def kill_at(call: int, patch: pytest.MonkeyPatch) -> None:
    """Die before the call-th change of a file system."""
    left = [call]

    def dying(original):
        def replaced(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            return original(*args, **kwargs)

        return replaced

    for owner, names in ((os, ("fsync", "replace", "rename", "mkdir", "rmdir", "unlink")),):
        for name in names:
            patch.setattr(owner, name, dying(getattr(owner, name)))


def test_killed_at_any_step_leaves_a_complete_checkpoint(alone, tmp_path):
    """keep_last 1: the oldest is removed in the same call."""
    trained, calls = networks(alone, 0), 0
    first = values(trained)
    Checkpoints(tmp_path / "one", 1, alone).save(1, trained)
    step(trained)
    second, found = values(trained), []
    while True:
        calls += 1
        run = tmp_path / f"run_{calls}"
        shutil.copytree(tmp_path / "one", run)
        with pytest.MonkeyPatch.context() as patch:
            kill_at(calls, patch)
            try:
                Checkpoints(run, 1, alone).save(2, trained)
                break
            except (Killed, OSError):  # torch's writer passes the first on as its own
                pass
        saves, other = Checkpoints(run, 1, alone), networks(alone, 7)
        iteration, folder = saves.newest()
        saves.load(folder, other)
        assert_same(values(other), first if iteration == 1 else second)
        assert not list(saves.folder.glob(".partial*"))
        found.append(iteration)
    assert found == sorted(found) and {1, 2} == set(found) and len(found) > 10, found


CHILD = """
import os, sys, threading, time
from pathlib import Path
from sharded import networks
from senseflow.engine import checkpoint
from senseflow.common.ranks import start_ranks
ranks = start_ranks()
saves = checkpoint.Checkpoints(Path(sys.argv[1]), 1, ranks, asynchronous=True)
trained = networks(ranks, 0)
saves.save(1, trained)
saves.wait()
digest = checkpoint.sha256
def dying():
    time.sleep(0.5)
    os.kill(os.getpid(), 9)
checkpoint.sha256 = dying
saves.save(2, trained)
print("training goes on", flush=True)
time.sleep(60)
"""


def test_kill_9_in_the_background_leaves_the_checkpoint_before(alone, tmp_path):
    path = f"{Path(__file__).parents[1] / 'parts'}:{os.environ.get('PYTHONPATH', '')}"
    result = subprocess.run(
        [PYTHON, "-c", CHILD, tmp_path], env={**os.environ, "PYTHONPATH": path},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == -9 and result.stdout == "training goes on\n", result.stderr
    assert (tmp_path / "checkpoints" / ".partial").is_dir()
    saves = Checkpoints(tmp_path, 1, alone)
    assert saves.newest() == (1, tmp_path / "checkpoints" / "step_0000001")
    assert [p.name for p in saves.folder.iterdir()] == ["step_0000001"]


def test_folders_deleted_between_saves_are_made_again(alone, tmp_path):
    saves, trained = Checkpoints(tmp_path / "run", 2, alone), networks(alone, 0)
    for iteration, folder in enumerate((saves.folder, saves.run), start=1):
        saves.save(iteration, trained)
        shutil.rmtree(folder)
    saves.save(3, trained)
    assert saves.newest() == (3, saves.folder / "step_0000003")


@pytest.mark.parametrize("moment", ["sha256", "publish"])
def test_a_folder_deleted_during_a_save_is_one_clear_error(alone, tmp_path, monkeypatch, moment):
    saves, trained = Checkpoints(tmp_path, 2, alone), networks(alone, 0)
    original = getattr(checkpoint, moment)

    def deleting(*args):
        shutil.rmtree(saves.folder)
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, moment, deleting)
        with pytest.raises(OSError, match=r"step_0000001 failed: .*No such file or directory"):
            saves.save(1, trained)
    saves.save(2, trained)
    assert saves.newest()[0] == 2


def test_keep_last_does_not_count_a_damaged_one(alone, tmp_path):
    trained = networks(alone, 0)
    for iteration in (1, 2, 9):
        Checkpoints(tmp_path, 0, alone).save(iteration, trained)
    file = next((tmp_path / "checkpoints" / "step_0000009").glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-1])
    saves = Checkpoints(tmp_path, 2, alone)
    assert saves.newest()[0] == 2
    saves.save(3, trained)
    names = sorted(p.name for p in saves.folder.iterdir())
    assert names == ["step_0000002", "step_0000003", "step_0000009"]


def test_an_error_in_the_background_does_not_hide_another(alone, tmp_path, monkeypatch, caplog):
    saves, trained = Checkpoints(tmp_path, 2, alone, asynchronous=True), networks(alone, 0)
    monkeypatch.setattr(checkpoint, "publish", failing)
    with pytest.raises(ZeroDivisionError), saves:
        saves.save(1, trained)
        raise ZeroDivisionError
    assert "No space left" in caplog.text
    with pytest.raises(OSError, match="No space left"), saves:
        saves.save(1, trained)


def test_an_ema_starts_from_the_student_where_the_checkpoint_has_none(alone, tmp_path, caplog):
    saves, trained = Checkpoints(tmp_path, 0, alone), networks(alone, 0)
    folder = saves.save(1, trained)
    other = networks(alone, 7)
    ema = Ema.start(other["generator"].network, 0.5)
    with caplog.at_level("INFO"):
        saves.load(folder, other, ema)
    assert "holds no EMA: it starts from the student" in caplog.text
    got = values(other, ema)
    for name, _ in trained["generator"].network.named_parameters():
        assert torch.equal(got[f"ema.{name}"], values(trained)[f"generator.{name}"])
    folder = saves.save(2, other, ema)
    saves.load(folder, networks(alone, 8))  # switched off again: ignored


def test_a_disk_that_cannot_be_written_is_said(alone, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"SAVE_DIR .*file/run cannot be written: "):
        share_folder(tmp_path / "file" / "run", HostGroup(alone))
    assert disk.PARTIAL not in " ".join(p.name for p in tmp_path.iterdir())
