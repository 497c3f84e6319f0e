"""What `evaluate generate` draws: a job for the teacher, and one for each way of the student."""

import argparse
import logging
from pathlib import Path
from typing import Any

from senseflow.engine.disk import write_whole
from senseflow.evaluate.layouts import TEACHER, Collection, Layout, refuse_foreign
from senseflow.sampling.cli import chosen, own_share
from senseflow.sampling.generate import (
    Job,
    Machine,
    Student,
    draw_all,
    find_machine,
    find_network,
    make_job,
)
from senseflow.sampling.job import Shot, shard_of
from senseflow.sampling.planning import trained_anchors
from senseflow.teachers.family import Family

logger = logging.getLogger(__name__)


def draw_folders(
    family: Family, args: argparse.Namespace, layout: Layout, collections: list[Collection]
) -> None:
    """Draw what is missing in all folders; all are checked before anything is loaded."""
    machine = find_machine(args)
    jobs = make_jobs(family, args, layout, collections, machine)
    for file, text in [n for job in jobs for n in missing_notes(job.shots, layout).items()]:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, text)
    draw_all(family, jobs, machine)
    for job in jobs:
        num, new = len(job.shots), len(job.todo)
        logger.info("%d images in %s, %d of them new", num, args.output_dir / job.name, new)


def make_jobs(
    family: Family,
    args: argparse.Namespace,
    layout: Layout,
    collections: list[Collection],
    machine: Machine,
) -> list[Job]:
    """The teacher's job, then the student's, one for each number of steps and sampler.

    The teacher is drawn at the student's size, as what it is compared with.
    """
    jobs = []
    if args.checkpoint:
        student = find_network(family, args)
        trained = len(trained_anchors(family, args, student.files.card))
        for steps in dict.fromkeys(args.steps or [trained]):
            for sampler in dict.fromkeys(args.samplers):
                own = _with(args, steps=steps, sampler=sampler, levels=None, teacher=False)
                name = f"{args.name}_{steps}_{sampler}"
                jobs.append(_job(family, own, student, layout, collections, machine, name))
    if args.no_teacher:
        return jobs
    size = jobs[0].plan if jobs else args
    teacher = _with(
        args, teacher=True, checkpoint=None, config=None, lora=None, ema=False, levels=None,
        sampler=None, steps=args.teacher_steps, guidance=args.teacher_guidance,
        height=size.height, width=size.width,
        seed=args.seed if args.teacher_seed is None else args.teacher_seed,
    )  # fmt: skip
    return [_job(family, teacher, None, layout, collections, machine, TEACHER), *jobs]


def _with(args: argparse.Namespace, **changes: Any) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(args), **changes})


def _job(
    family: Family,
    args: argparse.Namespace,
    student: Student | None,
    layout: Layout,
    collections: list[Collection],
    machine: Machine,
    name: str,
) -> Job:
    shots = []
    num_seeds = args.seeds or layout.num_seeds
    for collection in collections:
        every = layout.shots(args.output_dir / name, collection, num_seeds, args.seed)
        refuse_foreign(every)
        wanted = {prompt.index for prompt in chosen(collection.prompts, collection.file, args)}
        shots += [shot for shot in every if shot.prompt.index in wanted]
    own = own_share(shots, *shard_of(args.shard))
    return make_job(family, args, student, machine, own, name)


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
