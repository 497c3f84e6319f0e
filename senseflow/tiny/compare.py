"""Measure students of several embedded teachers, and put them in one table and one picture.

Each pair of a teacher and its student is a line: the teacher at 28 steps (its FID-T is the floor
that sampling noise leaves), the teacher at 4 steps with whichever of its samplers is nearer to
that, the student at 4 steps with the sampler of its recipe. The whole table of each teacher, as
senseflow.tiny.measure writes it, follows below.
"""

import dataclasses
import sys
from pathlib import Path

import torch

from senseflow.common.commands import Parser, exit_status, module_parser, path_given
from senseflow.common.templates import markdown_table
from senseflow.tiny.families import TEACHER_STEPS, Method, Sampler
from senseflow.tiny.judge import Judge
from senseflow.tiny.measure import (
    add_common_arguments,
    draw_comparison,
    format_table,
    measure_all,
    mixed_prompts,
    said,
    write_report,
)

NUM_STEPS = 4
MEASURES = {"fid_t": "FID-T", "all": "all attributes", "mean": "mean attribute"}
Pair = tuple[str, Path, Path]  # name, teacher's pipeline, student's checkpoint
Rows = dict[str, dict[str, float]]


def by_teacher(pairs: list[Pair]) -> dict[Path, dict[str, Path]]:
    """Pipeline folder -> {name: checkpoint}, so that a teacher is measured once."""
    teachers: dict[Path, dict[str, Path]] = {}
    for name, pipeline, checkpoint in pairs:
        if name == "teacher" or any(name in students for students in teachers.values()):
            raise ValueError(f"--pair wants a name of its own, got {name!r}")
        teachers.setdefault(pipeline, {})[name] = checkpoint
    return teachers


def compare(
    sampler: Sampler,
    judge: Judge,
    students: dict[str, Path],
    num_seeds: int,
    num_shown: int,
    processes: int,
) -> tuple[Rows, Rows, dict[str, torch.Tensor]]:
    """A teacher and its students: all rows, one line of figures per student, and pictures."""
    family = sampler.family
    for name, checkpoint in students.items():
        sampler.add_student(name, checkpoint)
    many = family.many_steps
    few = [Method("teacher", NUM_STEPS, name) for name in family.teacher_samplers]
    own = {name: Method(name, NUM_STEPS, family.recipe_sampler) for name in students}
    others = [
        Method(name, NUM_STEPS, other)
        for name in students
        for other in family.student_samplers
        if other != family.recipe_sampler
    ]
    others += [method for name in students for method in sampler.as_trained(name)]
    methods = [many, *few, *own.values(), *others]
    rows, pictures = measure_all(sampler, judge, methods, num_seeds, num_shown, processes)
    better = min(few, key=lambda method: rows[method.label()]["fid_t"])
    figures: Rows = {}
    shown: dict[str, torch.Tensor] = {}
    for name, method in own.items():
        chosen = {"many": many, "few": better, "student": method}
        figures[name] = {
            f"{which} {key}": rows[other.label()][key]
            for which, other in chosen.items()
            for key in MEASURES
        }
        for other in chosen.values():
            role = "teacher" if other.network == "teacher" else "student"
            label = dataclasses.replace(other, network=role).label()
            shown[f"{name}: {label}"] = pictures[other.label()]
    return rows, figures, shown


def format_summary(figures: Rows) -> str:
    """A Markdown table with a line per student."""
    groups = {
        "many": f"teacher, {TEACHER_STEPS} steps",
        "few": f"teacher, {NUM_STEPS} steps",
        "student": f"student, {NUM_STEPS} steps",
    }
    heads = [f"{who}: {what}" for who in groups.values() for what in MEASURES.values()]
    rows = [[name, *(said(*figure) for figure in line.items())] for name, line in figures.items()]
    return markdown_table(["", *heads], rows)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the summary, write table.md, results.json, comparison.png. Returns 0,
    or 2 for wrong input, said in one line.
    """
    args = build_parser().parse_args(arguments)

    def work() -> None:
        torch.set_num_threads(1)
        teachers = by_teacher(
            [(name, path_given("--pair", p), path_given("--pair", c)) for name, p, c in args.pair]
        )
        prompts, judge = mixed_prompts(args.num_prompts), Judge.load(args.common / "judge")
        results: dict[str, Rows] = {}
        figures: Rows = {}
        shown: dict[str, torch.Tensor] = {}
        for pipeline, students in teachers.items():
            sampler = Sampler(pipeline, prompts)
            rows, lines, pictures = compare(
                sampler, judge, students, args.seeds, args.columns, args.processes
            )
            results[", ".join(students)] = rows
            figures |= lines
            shown |= pictures
        summary = format_summary(figures)
        parts = [summary, *(f"## {name}\n\n{format_table(rows)}" for name, rows in results.items())]
        picture = draw_comparison(shown, prompts)
        write_report(args.output, "\n".join(parts), results, picture)
        print(summary)

    return exit_status(work, "nothing was written")


def build_parser() -> Parser:
    """The flags."""
    parser = module_parser(
        "senseflow.tiny.compare",
        __doc__,
        "example: python -m senseflow.tiny.compare --common assets/tiny/common "
        "--pair FLUX assets/tiny/flux/pipeline runs/flux --output report",
    )
    parser.add_argument(
        "--pair",
        nargs=3,
        action="append",
        required=True,
        metavar=("NAME", "PIPELINE", "CKPT"),
        help="a line: teacher's pipeline folder, student's run folder or checkpoint; repeat it",
    )
    add_common_arguments(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
