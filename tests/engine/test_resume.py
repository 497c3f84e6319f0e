"""What a run that goes on says and shows: no iteration twice, nothing lost without a word."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import short_runs
from short_runs import begin, configure, finish
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from senseflow.engine.log import Log
from senseflow.report.run_folder import read_run, read_starts

QUICK = (
    "adversarial.kind=none",
    "isg.weight=0",
    "train.log_interval=1",
    "train.save_interval=2",
    "log.sample_interval=1",
    "log.tensorboard=true",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return short_runs.write_pictures(tmp_path_factory.mktemp("data"))


def steps_shown(events: Path, tag: str = "loss/dmd") -> list[int]:
    """As TensorBoard itself reads a folder of event files."""
    shown = EventAccumulator(str(events))
    shown.Reload()
    return [scalar.step for scalar in shown.Scalars(tag)]


def steps_kept(run: Path) -> list[int]:
    return [json.loads(row)["iteration"] for row in (run / "stats.jsonl").read_text().splitlines()]


def test_iterations_that_are_done_again_are_shown_once(tmp_path):
    first = Log(tmp_path, tensorboard=True)
    for iteration in (10, 20, 30, 40):
        first.write(
            iteration, {"loss/dmd": 1.0, "loss/rare": 0.0} if iteration > 20 else {"loss/dmd": 1}
        )
    first.close()
    second = Log(tmp_path, tensorboard=True, done=20)
    assert steps_kept(tmp_path) == [10, 20]
    second.write(30, {"loss/dmd": 2.0})
    second.close()
    assert steps_shown(tmp_path / "tensorboard") == steps_kept(tmp_path) == [10, 20, 30]
    shown = EventAccumulator(str(tmp_path / "tensorboard"))
    shown.Reload()
    assert shown.Scalars("loss/dmd")[-1].value == 2
    assert "loss/rare" not in shown.Tags()["scalars"] or not shown.Scalars("loss/rare")
    assert [first for _, first in read_starts(tmp_path / "tensorboard")] == [1, 21]


def test_events_of_a_folder_that_is_removed_under_the_run_go_on(tmp_path):
    log = Log(tmp_path / "run", tensorboard=True)
    log.write(10, {"loss/dmd": 1.0})
    shutil.rmtree(tmp_path / "run")
    log.write(20, {"loss/dmd": 2.0})
    log.close()
    assert steps_shown(tmp_path / "run" / "tensorboard") == steps_kept(tmp_path / "run") == [20]


def test_a_run_goes_on_from_an_older_checkpoint_and_ends(data, tmp_path, caplog):
    """Its newest is damaged: rows, events, strips and last_iter of what is lost are gone, and a
    third start has nothing to do and says so."""
    caplog.set_level(logging.INFO, "senseflow")
    config = configure(data, *QUICK, "train.iter_num=4")
    finish(begin(config, tmp_path))
    assert "iteration 1 of 4 follows" in caplog.text
    student = tmp_path / "student" / "step_0000004"
    assert f"iteration 4 of 4 is done; the student is {student}" in caplog.text
    for what in ("the VAE of", "the student, Flux", "the fake score, Flux", "the teacher, Flux"):
        assert f"{what}" in caplog.text
    next((tmp_path / "checkpoints" / "step_0000004").glob("*.distcp")).unlink()
    run = begin(config, tmp_path)
    done = run.resume()
    assert done == 2 and "step_0000002, of 4 iterations" in caplog.text
    assert (tmp_path / "last_iter").read_text() == "2\n"
    assert {strip.stem for strip in (tmp_path / "samples").iterdir()} <= {
        "step_0000001",
        "step_0000002",
    }
    finish(run)
    assert steps_kept(tmp_path) == [1, 2, 3, 4]
    assert steps_shown(tmp_path / "tensorboard", "loss/fake") == [1, 2, 3, 4]
    read = read_run(tmp_path)
    assert read.resumed == (3,) and read.done == 4 and read.notices == []
    events = len(list((tmp_path / "tensorboard").iterdir()))
    caplog.clear()
    finish(begin(config, tmp_path))
    assert "nothing is left to train: 4 of train.iter_num 4 iterations are done" in caplog.text
    assert len(list((tmp_path / "tensorboard").iterdir())) == events

    shutil.rmtree(tmp_path / "checkpoints")
    begin(config, tmp_path).resume()
    assert "last_iter says 4, but there is no checkpoint: the run begins anew" in caplog.text
    assert not (tmp_path / "last_iter").exists() and not list((tmp_path / "samples").iterdir())
