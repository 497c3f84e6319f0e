"""`evaluate generate`: the teacher's images and a student's, one folder per way of drawing.

OUTPUT/teacher, and OUTPUT/student_4_x0 for 4 steps of the x0 sampler (student_4_cps_0.7: of cps at
eta .7), each in the layout asked for.
"""

import dataclasses
import logging
from pathlib import Path

from senseflow.common.fields import flag_names, plain
from senseflow.common.files import write_whole
from senseflow.common.quiet import quiet_libraries
from senseflow.evaluate.layouts import TEACHER, Layout, Selection
from senseflow.sampling.drawing import Drawing, Machine, Paths
from senseflow.sampling.generate import Job, draw_all, make_job
from senseflow.sampling.job import Output, Shot
from senseflow.sampling.model import Model, find_model
from senseflow.sampling.pipeline import Pipeline
from senseflow.teachers.family import Family

logger = logging.getLogger(__name__)


def draw_folders(
    family: Family,
    paths: Paths,
    name: str,
    drawings: list[Drawing],
    teacher: Drawing | None,
    selection: Selection,
    machine: Machine,
    output: Output,
) -> None:
    """Draw what is missing in all folders; all are checked before anything is loaded.

    name: begins those of the student's folders, one for each of its drawings. The teacher is drawn
    at the student's size, as what it is compared with.
    """
    quiet_libraries()
    model = find_model(family, paths)  # the student, if there is one
    pipeline = Pipeline(model, machine)
    shard, num_shards = output.shard

    def make(model: Model, drawing: Drawing, folder: str) -> Job:
        """This share of a folder's images."""
        if model.student:
            plan = model.plan(drawing)
            folder = f"{folder}_{plan.steps}_{plan.sampler}"
            folder += f"_{plain(plan.eta)}" if plan.eta is not None else ""
        shots = selection.shots(output.folder / folder, drawing.seed)[shard::num_shards]
        return make_job(model, drawing, pipeline.dtype, shots, output.overwrite, folder)

    jobs = [make(model, drawing, name) for drawing in drawings]
    if teacher:
        if jobs:
            size = jobs[0].plan
            teacher = dataclasses.replace(teacher, height=size.height, width=size.width)
        base = Model(family, Paths(paths.base), None)
        # first: its network comes with the pipeline
        with flag_names(steps="--teacher_steps", guidance="--teacher_guidance"):
            jobs.insert(0, make(base, teacher, TEACHER))
    for file, text in [
        n for job in jobs for n in missing_notes(job.shots, selection.layout).items()
    ]:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, text)
    draw_all(jobs, pipeline, output)
    for job in jobs:
        num, new = len(job.shots), len(job.todo)
        logger.info("%d images in %s, %d of them new", num, output.folder / job.name, new)


def missing_notes(shots: list[Shot], layout: Layout) -> dict[Path, str]:
    """The files a benchmark wants beside its images; raises ValueError when one says otherwise."""
    notes = dict(note for shot in shots if (note := layout.note(shot)))
    there = {file for file in notes if file.is_file()}
    for file in there:
        if file.read_text(encoding="utf-8") != notes[file]:
            raise ValueError(
                f"{file} is of another prompts file: choose another --output_dir, or remove it"
            )
    return {file: text for file, text in notes.items() if file not in there}
