"""One trial of an ablation: a training run like any other, and what its students measure.

trials/NAME/run/           the run folder: config.yaml, stats.jsonl, the last student
trials/NAME/result.json    measures; it is there when the trial is done
trials/NAME/pictures.png   the first pictures of the last student
"""

import dataclasses
import json
import os
import shutil
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from senseflow.common.files import write_whole
from senseflow.common.pictures import save_whole, to_pil
from senseflow.common.signals import StopRequest
from senseflow.config.config import Config
from senseflow.config.recipes import RECIPES
from senseflow.engine.build import prepare
from senseflow.engine.inputs import read_run
from senseflow.engine.loop import NonFiniteError
from senseflow.evaluate.metrics.frechet import FeatureStatistics
from senseflow.tiny.ablate.study import Trial
from senseflow.tiny.families import REFERENCE_SEED, Method, Sampler, few_step_methods
from senseflow.tiny.judge import Judge
from senseflow.tiny.measure import mixed_prompts
from senseflow.tiny.pictures import SIZE

NUM_STEPS = (8, 4, 2, 1)
CURVE_STEPS = 4  # of the measurements on the way
NUM_SHOWN = 12
STRIP = "pictures.png"
MEASURES = ("fid_t", "all", "mean", "digits", "colours")
JUDGE = "assets/tiny/common/judge"
Row = dict[str, float]


@dataclasses.dataclass
class Ruler:
    """How pictures of one teacher are drawn and measured; `reference` is of the teacher's own at
    28 steps, from other noise than all others."""

    sampler: Sampler
    judge: Judge
    reference: FeatureStatistics

    def measure(self, method: Method) -> Row:
        """The measures of a network, a number of steps and a sampler."""
        row = self.judge.measure(
            self.sampler.draw(method, method.first_seed),
            self.sampler.prompts,
            {"fid_t": self.reference},
        )
        return {name: row[name] for name in MEASURES}


@lru_cache(maxsize=4)
def ruler_of(pipeline: Path, num_prompts: int, file: Path) -> Ruler:
    """The ruler of a teacher; the features of its reference are kept in `file`."""
    sampler = Sampler(pipeline, mixed_prompts(num_prompts))
    judge = Judge.load(JUDGE)
    if not file.is_file():
        features = judge.features(sampler.draw(sampler.family.many_steps, REFERENCE_SEED))
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}")  # workers may come to it at once
        torch.save(features, partial)
        partial.replace(file)
    features = torch.load(file, weights_only=True)
    return Ruler(sampler, judge, FeatureStatistics.of(features))


def ruler_for(trial: Trial, output: Path, config: Config) -> Ruler:
    """The ruler of a trial's teacher."""
    file = output / "references" / f"{trial.ruler}.pt"
    return ruler_of(Path(config.paths.pretrained_model), trial.num_prompts, file)


def measure_teacher(ruler: Ruler) -> dict[str, Row]:
    """The teacher at many steps (with other noise than the reference: the floor) and at few."""
    family = ruler.sampler.family
    ruler.sampler.networks["untrained"] = ruler.sampler.untrained()
    methods = [
        family.many_steps,
        *few_step_methods("teacher", family.teacher_samplers, NUM_STEPS[:-1]),
        Method("untrained", CURVE_STEPS, family.recipe_sampler),
    ]
    return {method.label(): ruler.measure(method) for method in methods}


def measure_student(ruler: Ruler, student: Path) -> dict[str, Row]:
    """A student at every number of steps with its recipe's sampler, and at 4 with the other, and by
    cps where rewards have trained it."""
    family = ruler.sampler.family
    ruler.sampler.add_student("student", student)
    rows = {
        f"{num} steps": ruler.measure(Method("student", num, family.recipe_sampler))
        for num in NUM_STEPS
    }
    (other,) = set(family.student_samplers) - {family.recipe_sampler}
    also = [
        Method("student", CURVE_STEPS, other),
        *ruler.sampler.as_trained("student", CURVE_STEPS),
    ]
    return rows | {m.label().removeprefix("student, "): ruler.measure(m) for m in also}


def run_trial(trial: Trial, output: Path, stop: StopRequest) -> bool:
    """Train and measure; False when it was stopped before its end, and goes on when called again.

    A loss that is not finite ends the training, not the trial: that is a result, and one for the
    trials that go on from it.
    """
    folder = trial.folder(output)
    began = time.process_time()
    cause = diverged_before(trial, output)
    initial = trial.after.folder(output) / "run" if trial.after else None
    config = trial.config(output / "data" / "data.json", initial)
    diverged = cause or train(config, folder / "run", stop)
    result: dict[str, Any] = {"trial": dataclasses.asdict(trial), "diverged": diverged}
    if not stop.reason:
        ruler = ruler_for(trial, output, config)
        students = students_of(folder / "run", config)
        result |= {"curve": curve(ruler, students), "rows": {}}
        if students:
            last = students[max(students)]
            result["rows"] = measure_student(ruler, last)
            drawn = Method("student", CURVE_STEPS, ruler.sampler.family.recipe_sampler)
            save_whole(strip(ruler, drawn), folder / STRIP)
        result |= figures(folder / "run", config)
    result["cpu_s"] = add_time(folder / "cpu_s", time.process_time() - began)
    if stop.reason:
        return False
    write_whole(folder / "result.json", json.dumps(result, indent=1) + "\n")
    for iteration, student in students.items():
        if iteration < max(students):
            shutil.rmtree(student)
    return True


def diverged_before(trial: Trial, output: Path) -> str | None:
    """Why there is nothing to go on from; None where there is, or need not be."""
    if not trial.after:
        return None
    before = json.loads((trial.after.folder(output) / "result.json").read_text())
    return before["diverged"] and f"the run it goes on from: {before['diverged']}"


def add_time(file: Path, seconds: float) -> float:
    """The processor's seconds of a trial, over all processes that worked on it."""
    before = float(file.read_text()) if file.is_file() else 0.0
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, f"{before + seconds:.3f}\n")
    return before + seconds


def strip(ruler: Ruler, method: Method) -> Image.Image:
    """The first pictures of a network, side by side."""
    pictures = ruler.sampler.draw(method, 0, num=NUM_SHOWN)
    canvas = Image.new("RGB", (len(pictures) * SIZE, SIZE))
    for place, picture in enumerate(to_pil(pictures)):
        canvas.paste(picture, (place * SIZE, 0))
    return canvas


def teacher_rows(trial: Trial, output: Path) -> Path:
    """Where the measures of a trial's teacher are kept, and its pictures beside them."""
    return output / "teachers" / trial.ruler / "rows.json"


def train(config: Config, folder: Path, stop: StopRequest) -> str | None:
    """A run to its end, or what was not finite."""
    run = prepare(read_run(config, RECIPES[config.recipe].family), folder)
    done = run.resume()
    try:
        with run.checkpoints:
            run.train(done, stop, show=False)
    except NonFiniteError as error:
        return str(error)
    return None


def curve(ruler: Ruler, students: dict[int, Path]) -> list[Row]:
    """The measures at 4 steps of every student of a run, by iteration."""
    rows = []
    for iteration, student in students.items():
        ruler.sampler.add_student("student", student)
        row = ruler.measure(Method("student", CURVE_STEPS, ruler.sampler.family.recipe_sampler))
        rows.append({"iteration": iteration, **row})
    return rows


def students_of(run: Path, config: Config) -> dict[int, Path]:
    """The students of a run by iteration, none if it diverged at once; of those that it was to
    save, for a stop saves others."""
    folders = sorted((run / "student").glob("step_*"))
    found = {int(folder.name.removeprefix("step_")): folder for folder in folders}
    train = config.train
    return {i: f for i, f in found.items() if i % train.save_interval == 0 or i == train.iter_num}


def figures(run: Path, config: Config) -> dict[str, float]:
    """The IDA gap and the largest gradient norm over the last half of a run."""
    file = run / "stats.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    late = [row for row in rows if row["iteration"] > config.train.iter_num / 2] or rows[-1:]
    norms = [row["grad_norm/generator"] for row in late if "grad_norm/generator" in row]
    found: dict[str, float] = {"updates": config.train.iter_num // config.fake_score.ttur}
    if late:
        gap = sum(row["ida/gap"] for row in late) / len(late)
        found |= {"gap": gap, "grad_norm": max(norms, default=0.0)}
    return found
