"""`python -m senseflow.tiny.ablate`: its studies, its trials, and a whole quick one."""

import json
import shutil
import statistics
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from PIL import Image
from statuses import status_of

from senseflow.common.files import only_writer
from senseflow.common.signals import StopRequest
from senseflow.config.strict_yaml import read_strictly
from senseflow.tiny.ablate import __main__ as ablate
from senseflow.tiny.ablate import run as ablation
from senseflow.tiny.ablate import trial
from senseflow.tiny.ablate.findings import Findings, floor_of, spread, table_of, teacher_lines
from senseflow.tiny.ablate.run import Ablation
from senseflow.tiny.ablate.study import Study, places_of, quick

STUDY = Path("configs/ablation.yaml")
REWARDS = Path("configs/ablation_rewards.yaml")
FLUX = "configs/FLUX/flux_senseflow_tiny.yaml"
SMALL = {
    "seeds": [0, 1],
    "num_prompts": 4,
    "overrides": {
        "train.iter_num": 2,
        "train.save_interval": 1,
        "train.batch_size": 2,
        "train.keep_last": 1,
        "fake_score.ttur": 1,
        "lr_scheduler.warmup_iterations": 0,
        "lr_scheduler.decay_iterations": 0,
        "log.tensorboard": False,
        "log.sample_interval": 0,
        "adversarial.kind": "none",
    },
    "teachers": {"FLUX": {"config": FLUX}},
    "tables": {
        "parts": {
            "title": "Parts",
            "teachers": ["FLUX"],
            "cells": {"whole": {}, "no IDA": {"overrides": {"ida.lam": None}}},
        },
        "steps": {
            "title": "Steps",
            "teachers": ["FLUX"],
            "cells": {
                "1 step": {"overrides": {"anchors.times": [1000]}, "after": "4 steps"},
                "4 steps": {},
            },
        },
    },
}


def write(folder: Path, **changes: object) -> Path:
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump({**SMALL, **changes}))
    return file


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> tuple[Path, Path]:
    """A small study, run by two workers: its file and its output."""
    folder = tmp_path_factory.mktemp("ablation")
    file = write(folder)
    output = folder / "output"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablation, "NUM_DATA", 16)
        status = ablate.main(["--study", str(file), "--output", str(output), "--workers", "2"])
    assert status == 0
    return file, output


def test_equal_cells_are_one_trial_and_a_rerun_of_it_keeps_its_name(tmp_path):
    study = read_strictly(Study, write(tmp_path))
    places = places_of(study)
    assert len(places) == 2 * 4
    whole = places["parts", "FLUX", "whole", 0]
    assert whole.key == places["steps", "FLUX", "4 steps", 0].key
    keys = {t.key for t in places.values()}
    assert len(keys) == 2 * 3
    assert places["steps", "FLUX", "1 step", 1].after == places["steps", "FLUX", "4 steps", 1]
    changed = places_of(read_strictly(Study, write(tmp_path, num_prompts=6)))
    assert not keys & {t.key for t in changed.values()}


def test_the_published_study_is_a_study_and_every_row_differs():
    study = read_strictly(Study, STUDY)
    places = places_of(study)
    assert len(study.seeds) >= 3
    for name, table in study.tables.items():
        for teacher in table.teachers:
            keys = {places[name, teacher, row, 0].key for row in table.cells}
            assert len(keys) == len(table.cells), (name, teacher)
    assert len(places_of(quick(study), is_quick=True)) < len(places) / 3


def test_the_study_of_rewards_begins_with_the_teacher_and_goes_on_from_its_own_student():
    """Whatever run the recipe of its rows begins with."""
    study = read_strictly(Study, REWARDS)
    places = places_of(study)
    rows = {row: places["rewards", "FLUX", row, 0] for row in study.tables["rewards"].cells}
    assert len({trial.key for trial in rows.values()}) == len(rows)
    student, others = rows.pop("student"), rows.values()
    assert student.config(Path("data.json")).paths.initial is None
    assert all(trial.after == student for trial in others)
    config = rows["GRPO"].config(Path("data.json"), Path("run"))
    assert config.paths.initial == "run" and config.reward.weight > 0 and config.dmd.weight == 1
    rewards = {
        row: trial.config(Path("data.json"), Path("run")).reward for row, trial in rows.items()
    }
    assert not student.config(Path("data.json")).reward.in_use
    assert not rewards["no reward"].in_use
    reflected = {row for row, reward in rewards.items() if reward.last_weight > 0}
    assert reflected == {"back-propagation", "back-propagation, no regulariser", "both"}


def test_report_holds_every_row_with_mean_and_spread(done):
    _, output = done
    report = (output / "report.md").read_text()
    results = json.loads((output / "results.json").read_text())
    assert len(results) == 8 and "6 of 6 trials done, seeds 0, 1" in report
    for row in ("whole", "no IDA", "1 step", "4 steps", "teacher, euler", "teacher, x0"):
        assert row in report
    values = [r["rows"]["4 steps"]["fid_t"] for r in results if r["row"] == "no IDA"]
    mean, deviation = statistics.mean(values), statistics.stdev(values)
    assert "| no IDA |" in report and f"{mean:.1f} ± {deviation:.1f} · " in report
    for name in ("parts_curves.png", "parts_pictures.png", "steps_curves.png"):
        with Image.open(output / name) as picture:
            assert min(picture.size) > 60
    (one,) = {t["trial"]["after"]["key"] for t in results if t["row"] == "1 step" and not t["seed"]}
    assert one == next(t["trial"]["key"] for t in results if t["row"] == "whole")
    assert not list(output.glob("trials/*/run/checkpoints"))


def test_a_curve_begins_where_its_training_does(done):
    """Untrained, or with the row that it goes on from."""
    file, output = done
    study = read_strictly(Study, file)
    findings = Findings.read(study, places_of(study), output)
    whole, after = (findings.curves_of("steps", "FLUX", row) for row in ("4 steps", "1 step"))
    (untrained,) = [v["fid_t"] for k, v in findings.teachers["FLUX"].items() if "untrained" in k]
    for seed, (one, other) in enumerate(zip(whole, after, strict=True)):
        assert list(one) == [0, 1, 2] and one[0] == untrained
        assert min(other) == 2 and other[2] == one[2], seed


def test_what_is_done_is_kept_and_what_is_lost_is_done_again(done, tmp_path):
    file, output = done
    before = {f: f.stat().st_mtime_ns for f in output.glob("trials/*/result.json")}
    ablation_ = Ablation.open(file, output, False, None)
    assert not ablation_.pending()
    lost = ablation_.places["parts", "FLUX", "no IDA", 1]
    shutil.move(lost.folder(output), tmp_path / "lost")
    assert [t.key for t in ablation_.pending()] == [lost.key]
    shutil.move(tmp_path / "lost", lost.folder(output))
    # what goes on from a run needs its state, which is gone: that run is done again too
    one = ablation_.places["steps", "FLUX", "1 step", 0]
    (one.folder(output) / "result.json").unlink()
    assert {t.key for t in ablation_.pending()} == {one.key, one.after.key}
    assert ablate.main(["--study", str(file), "--output", str(output), "--workers", "1"]) == 0
    after = {f: f.stat().st_mtime_ns for f in output.glob("trials/*/result.json")}
    assert after.keys() == before.keys()
    assert sum(after[f] != before[f] for f in before) == 2


class StopsAtOnce(StopRequest):
    """Asked to stop after the first iteration."""

    asked = 0

    @property
    def reason(self) -> str | None:
        self.asked += 1
        return "SIGTERM" if self.asked > 1 else None


@pytest.mark.long
def test_a_stopped_trial_goes_on_and_gives_the_same(done, tmp_path):
    """Stopped where it was not to save; its student of that iteration is no part of the curve."""
    _, output = done
    overrides = {**SMALL["overrides"], "train.save_interval": 2}
    study = read_strictly(Study, write(tmp_path, overrides=overrides))
    plan = places_of(study)["parts", "FLUX", "no IDA", 0]
    results = []
    for name, stops in (("stopped", [StopsAtOnce(), StopRequest()]), ("whole", [StopRequest()])):
        shutil.copytree(output / "data", tmp_path / name / "data")
        folder = tmp_path / name / "trials" / plan.name
        ends = [trial.run_trial(plan, tmp_path / name, stop) for stop in stops]
        assert ends == [False, True][-len(stops) :]
        assert (folder / "run" / "student" / "step_0000002").is_dir()
        results.append(json.loads((folder / "result.json").read_text()))
    stopped, whole = results
    assert [point["iteration"] for point in stopped["curve"]] == [2]
    for part in ("curve", "rows", "gap"):
        assert stopped[part] == whole[part]
    assert float((tmp_path / "whole" / "trials" / plan.name / "cpu_s").read_text()) > 0


def test_states_are_kept_for_what_goes_on_from_them(done, tmp_path):
    """a -> b -> c: to do c again where the states are gone, all three are done again."""
    cells = {
        "c": {"overrides": {"ida.lam": 0.3}, "after": "b"},
        "b": {"overrides": {"ida.lam": 0.2}, "after": "a"},
        "a": {"overrides": {"ida.lam": 0.1}},
    }
    table = {"title": "t", "teachers": ["FLUX"], "cells": cells}
    file = write(tmp_path, tables={"t": table}, seeds=[0])
    whole = Ablation.open(file, tmp_path / "o", False, None)
    names = {row: whole.places["t", "FLUX", row, 0].name for row in cells}
    for row in "ab":
        folder = tmp_path / "o" / "trials" / names[row]
        folder.mkdir(parents=True)
        (folder / "result.json").write_text('{"diverged": null}')
    assert [t.name for t in whole.pending()] == [names[row] for row in "abc"]
    (tmp_path / "o" / "trials" / names["b"] / "run" / "checkpoints").mkdir(parents=True)
    assert [t.name for t in whole.pending()] == [names["c"]]


def test_a_rebuilt_teacher_is_another(tmp_path, monkeypatch):
    study = read_strictly(Study, write(tmp_path))
    before = places_of(study)["parts", "FLUX", "whole", 0]
    monkeypatch.setattr(
        "senseflow.tiny.ablate.study.weights_of", lambda pipeline, component: "other"
    )
    after = places_of(study)["parts", "FLUX", "whole", 0]
    assert after.name != before.name and after.ruler != before.ruler


def test_teachers_of_one_configuration_have_trials_of_their_own(tmp_path):
    teachers = {"FLUX": {"config": FLUX}, "again": {"config": FLUX}}
    tables = {"t": {"title": "t", "teachers": ["FLUX", "again"], "cells": {"a": {}}}}
    file = write(tmp_path, teachers=teachers, tables=tables, seeds=[0])
    assert len(Ablation.open(file, tmp_path / "o", False, None).trials()) == 2


def test_a_run_that_diverges_is_a_result(tmp_path, monkeypatch):
    plan = places_of(read_strictly(Study, write(tmp_path)))["parts", "FLUX", "no IDA", 0]
    ablation.write_dataset(tmp_path / "data", 8, seed=0)

    def burst(self, *arguments: object, **words: object) -> None:
        raise trial.NonFiniteError("loss/dmd not finite in iterations 1 to 1")

    monkeypatch.setattr("senseflow.engine.loop.Run.train", burst)
    assert trial.run_trial(plan, tmp_path, StopRequest())
    result = json.loads((tmp_path / "trials" / plan.name / "result.json").read_text())
    assert "not finite" in result["diverged"] and result["rows"] == {} and result["curve"] == []
    after = places_of(read_strictly(Study, write(tmp_path)))["steps", "FLUX", "1 step", 0]
    shutil.move(tmp_path / "trials" / plan.name, tmp_path / "trials" / after.after.name)
    assert trial.run_trial(after, tmp_path, StopRequest())  # nothing to go on from: that is said
    result = json.loads((tmp_path / "trials" / after.name / "result.json").read_text())
    assert result["diverged"].startswith("the run it goes on from: loss/dmd not finite")
    whole = Ablation.open(tmp_path / "study.yaml", tmp_path, False, ["steps"])
    assert after.after.name not in {t.name for t in whole.pending()}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sede": [1]}, "unknown key sede; the nearest valid key is seeds"),
        ({"seeds": []}, "seeds is empty"),
        ({"seeds": [-1]}, "seeds[0] -1 must be from 0 to"),
        ({"teachers": {"SDXL": {"config": FLUX}}}, "tables.parts: no teacher 'FLUX' in teachers"),
        ({"overrides": {"ida.lambda": 1}}, "unknown key ida.lambda; the nearest valid key is"),
        ({"overrides": {"ida.lam": 7}}, "ida.lam 7.0 must be"),
        ({"overrides": {"paths.dataset": "x"}}, "paths.dataset is the ablation's own"),
        ({"tables": {"t": {"title": "t", "teachers": ["FLUX"], "cells": {}}}}, "at least one each"),
        (
            {"tables": {"t": {"title": "t", "teachers": ["FLUX"],
                              "cells": {"a": {"after": "b"}, "b": {"after": "a"}}}}},
            "in a circle",
        ),
        (
            {"tables": {"t": {"title": "t", "teachers": ["FLUX"], "cells": {"a": {"after": "z"}}}}},
            "tables.t.cells.a.after: no row 'z'",
        ),
    ],
)  # fmt: skip
def test_a_wrong_study_is_said_in_one_line(tmp_path, capsys, changes, said):
    file = write(tmp_path, **changes)
    assert ablate.main(["--study", str(file), "--output", str(tmp_path / "o")]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "o").exists()


def test_wrong_flags_are_said_in_one_line(tmp_path, capsys):
    file = str(write(tmp_path))
    (tmp_path / "taken").write_text("")
    for flags, said in (
        (["--study", "nowhere.yaml", "--output", str(tmp_path / "o")], "nowhere.yaml"),
        (["--study", file, "--output", str(tmp_path / "taken")], "is a file"),
        (["--study", file, "--output", str(tmp_path / "o"), "--tables", "x"], "has parts, steps"),
        (["--study", file, "--output", str(tmp_path / "o"), "--workers", "0"], "0 must be from 1"),
        (["--study", file, "--output", str(tmp_path / "o"), "--report"], "nothing there to report"),
        (["--study", str(tmp_path), "--output", str(tmp_path / "o")], "is a folder"),
    ):
        assert status_of(ablate.main, flags) == 2
        assert said in capsys.readouterr().err


def test_two_commands_do_not_work_in_one_folder(done, capsys):
    file, output = done
    with only_writer(output):
        assert ablate.main(["--study", str(file), "--output", str(output)]) == 2
    assert f"--output {output} is being written by another process" in capsys.readouterr().err
    assert ablate.main(["--study", str(file), "--output", str(output)]) == 0


def test_spread_is_the_sample_deviation():
    assert spread([1.0, 3.0]) == "2.0 ± 1.4" and spread([2.0]) == "2.0"


def test_teacher_lines_follow_the_columns():
    row = {"fid_t": 2.0, "all": 0.5}
    labels = ["28 steps", "8 steps, euler", "4 steps, euler", "1 step"]
    rows = {f"teacher, {label}": row for label in labels} | {"untrained, 4 steps, x0": row}
    rows["teacher, 2 steps, x0"] = row
    lines = dict(teacher_lines(rows))
    assert lines["teacher, euler"] == ["2.0 · 0.50", "2.0 · 0.50", "", "", ""]
    assert lines["teacher, x0"] == ["", "", "2.0 · 0.50", "2.0 · 0.50", ""]
    assert lines["before training"][1] == "2.0 · 0.50"
    assert "drawn once more with other noise: 2.0 · 0.50" in floor_of(rows)


def test_rows_that_train_by_cps_have_a_column_of_their_own(tmp_path):
    study = read_strictly(Study, write(tmp_path))
    plain = {f"{n} steps": {"fid_t": n, "all": 0.5} for n in (8, 4, 2, 1)}
    plain["4 steps, euler"] = {"fid_t": 3, "all": 0.5}
    by_cps = {**plain, "4 steps, cps 0.7": {"fid_t": 7, "all": 0.25}}
    rest = {"diverged": None, "cpu_s": 60, "updates": 1}
    results = {
        ("parts", "FLUX", row, seed): {"rows": rows, **rest}
        for row, rows in (("whole", plain), ("no IDA", by_cps))
        for seed in study.seeds
    }
    findings = Findings(study, results, {}, places_of(study), tmp_path)
    head, _, trained, other = table_of(findings, "parts", "FLUX").strip().splitlines()
    assert "| 4 steps, other sampler | 4 steps, cps 0.7 | IDA gap, % |" in head
    assert trained.startswith("| no IDA |")
    assert trained.endswith("| 3.0 ± 0.0 · 0.50 | 7.0 ± 0.0 · 0.25 | | 1 | 1.0 |")
    assert other.endswith("| 3.0 ± 0.0 · 0.50 | | | 1 | 1.0 |")
    assert "cps" not in table_of(replace(findings, results={}), "parts", "FLUX")


@pytest.mark.long
def test_quick_takes_less_than_three_minutes(tmp_path):
    began = time.monotonic()
    assert ablate.main(["--quick", "--output", str(tmp_path / "o"), "--workers", "2"]) == 0
    assert time.monotonic() - began < 180
    report = (tmp_path / "o" / "report.md").read_text()
    for table in read_strictly(Study, STUDY).tables.values():
        assert table.title in report
        assert all(f"| {row} |" in report for row in table.cells)
