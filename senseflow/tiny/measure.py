"""Measure an embedded teacher and its students: attribute accuracies, FID-T, FID-real, diversity.

Samples are drawn with the stock pipeline itself, of any family; a student that rewards have
trained by cps also by that. FID-T is the Frechet distance, in the judge's features, to the
teacher's own pictures at 28 steps of the same prompts; every other row, the teacher at 28 steps
included (the floor that sampling noise leaves), starts from other noise than that reference.
FID-real is the distance to rendered pictures of those prompts. Half of the prompts are held out.
Diversity is the mean distance of two pictures of a prompt; errors are far from all else, so that of
two right ones stands beside it.
"""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

from senseflow.common.commands import Parser, exit_status, module_parser, number, path_given
from senseflow.common.fields import Count, Guidance, SmallCount, Threads
from senseflow.common.pictures import to_pil
from senseflow.common.templates import markdown_table
from senseflow.evaluate.metrics.frechet import FeatureStatistics, frechet_distance
from senseflow.tiny.captions import attributes_of, is_held_out
from senseflow.tiny.families import (
    REFERENCE_SEED,
    FewSteps,
    Method,
    Sampler,
    few_step_methods,
    seeds_of,
)
from senseflow.tiny.judge import Judge, diversity
from senseflow.tiny.pictures import evaluation_prompts, render

REAL_SEED = 20_000
ZOOM, GAP = 2, 4  # of the comparison: times, pixels
Row = dict[str, Any]  # figures by name; one per seed in a list
COLUMNS = {
    "fid_t": "FID-T",
    "fid_real": "FID-real",
    "digits": "digits",
    "colours": "colours",
    "mean": "mean attribute",
    "all": "all attributes",
    "all_held_out": "all, held-out prompts",
    "diversity": "diversity",
    "diversity_right": "diversity of right ones",
}


def measure_row(
    judge: Judge,
    pictures: torch.Tensor,
    prompts: list[str],
    references: dict[str, FeatureStatistics],
) -> Row:
    """All measures of pictures (seeds, P, 3, 32, 32) of `prompts`, as named in `COLUMNS`."""
    num_seeds = len(pictures)
    row: Row = judge.measure(pictures.flatten(0, 1), prompts * num_seeds, references)
    held_out = [index for index, prompt in enumerate(prompts) if is_held_out(prompt)]
    if held_out:
        unseen = [prompts[index] for index in held_out] * num_seeds
        measured = judge.measure(pictures[:, held_out].flatten(0, 1), unseen, {})
        row["all_held_out"] = measured["all"]
        row["mean_held_out"] = measured["mean"]
    if num_seeds > 1:
        flat = judge.features(pictures.flatten(0, 1))
        right = (judge.read(flat) == attributes_of(prompts * num_seeds)).all(1)
        features, right = (x.unflatten(0, pictures.shape[:2]) for x in (flat, right))
        row["diversity"] = diversity(features.transpose(0, 1))
        of_right = diversity(features.transpose(0, 1), right.T)
        if not math.isnan(of_right):  # else no two of a prompt are right
            row["diversity_right"] = of_right
        if "fid_t" in references:  # to compare rows pair by pair
            each = [
                frechet_distance(FeatureStatistics.of(f), references["fid_t"]) for f in features
            ]
            row["fid_t_by_seed"] = each
    return row


def measure_all(
    sampler: Sampler,
    judge: Judge,
    methods: list[Method],
    num_seeds: int,
    num_shown: int,
    processes: int = 1,
) -> tuple[dict[str, Row], dict[str, torch.Tensor]]:
    """Measures of each method by label, and the first `num_shown` pictures of each.

    processes: that draw.
    """
    reference = replace(sampler.family.many_steps, first_seed=REFERENCE_SEED)
    methods = [reference, *methods]
    real_scenes = attributes_of(sampler.prompts * num_seeds)
    real = render(real_scenes, torch.Generator().manual_seed(REAL_SEED))
    references = {"fid_real": FeatureStatistics.of(judge.features(real))}
    rows: dict[str, Row] = {"real pictures": {}}
    shown = {"real pictures": real[:num_shown]}
    with sampler.several(processes) as draw:
        drawn = draw(job for method in methods for job in seeds_of(method, num_seeds))
        for method in tqdm(methods, desc="measure"):
            pictures = torch.from_numpy(np.stack([*islice(drawn, num_seeds)]))
            if method is reference:
                features = judge.features(pictures.flatten(0, 1))
                references["fid_t"] = FeatureStatistics.of(features)
            rows[method.label()] = measure_row(judge, pictures, sampler.prompts, references)
            shown[method.label()] = pictures[0, :num_shown]
    real = real.unflatten(0, (num_seeds, -1))
    rows["real pictures"] = measure_row(judge, real, sampler.prompts, references)
    return rows, shown


def format_table(rows: dict[str, Row]) -> str:
    """A Markdown table of the measures."""
    cells = [
        [label, *("-" if key not in row else said(key, row[key]) for key in COLUMNS)]
        for label, row in rows.items()
    ]
    return markdown_table(["", *COLUMNS.values()], cells)


def said(measure: str, value: float) -> str:
    """A distance with two digits, a share with three."""
    return f"{value:z.2f}" if "fid" in measure else f"{value:.3f}"


def labelled_rows(
    rows: Sequence[tuple[str, Sequence[Image.Image]]], heads: Sequence[str] = ()
) -> Image.Image:
    """Rows of pictures of one height, enlarged, each after its label; heads: above the columns."""
    margin, header = 16 + 6 * max(len(label) for label, _ in rows), 92 if heads else 0
    width, height = (ZOOM * side + GAP for side in rows[0][1][0].size)
    columns = max(len(pictures) for _, pictures in rows)
    canvas = Image.new("RGB", (margin + columns * width, header + len(rows) * height), "white")
    pen = ImageDraw.Draw(canvas)
    for column, head in enumerate(heads):
        pen.multiline_text((margin + column * width, 4), head, fill="black", font_size=9)
    for line, (label, pictures) in enumerate(rows):
        top = header + line * height
        pen.text((6, top + height // 2 - 8), label, fill="black", font_size=11)
        for column, picture in enumerate(pictures):
            enlarged = picture.resize((width - GAP, height - GAP), Image.Resampling.NEAREST)
            canvas.paste(enlarged, (margin + column * width, top))
    return canvas


def draw_comparison(shown: dict[str, torch.Tensor], prompts: list[str]) -> Image.Image:
    """A picture with one row per method and one column per prompt, labelled."""
    heads = []
    for prompt in prompts[: len(next(iter(shown.values())))]:
        words = prompt.replace(" left of ", "\nleft of\n").replace(" above ", "\nabove\n")
        text = words.replace(" on ", "\non ").replace("purple", "purpl.")
        heads.append(text + ("\n(held out)" if is_held_out(prompt) else ""))
    return labelled_rows([(label, to_pil(images)) for label, images in shown.items()], heads)


def mixed_prompts(num: int) -> list[str]:
    """`num` evaluation prompts, of the training and of the held-out scenes in turn."""
    trained = evaluation_prompts((num + 1) // 2, held_out=False)
    held_out = evaluation_prompts((num + 1) // 2, held_out=True)
    pairs = zip(trained, held_out, strict=True)
    return [prompt for pair in pairs for prompt in pair][:num]


def load_students(
    sampler: Sampler, students: list[str], several_steps: tuple[int, ...]
) -> list[Method]:
    """Give the sampler each NAME=CKPT of `students`; their rows."""
    methods = []
    for student in students:
        name, _, checkpoint = student.partition("=")
        if not checkpoint or name in sampler.networks:
            raise ValueError(f"--student wants NAME=CKPT with a name of its own, got {student!r}")
        sampler.add_student(name, path_given("--student", checkpoint))
        methods += few_step_methods(name, sampler.family.student_samplers, several_steps)
        methods += [row for steps in several_steps for row in sampler.as_trained(name, steps)]
    return methods


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the table, write table.md, results.json, comparison.png. Returns 0,
    or 2 for wrong input, said in one line.
    """
    args = build_parser().parse_args(arguments)

    def work() -> None:
        torch.set_num_threads(1)
        prompts, steps = mixed_prompts(args.num_prompts), tuple(dict.fromkeys(args.steps))
        sampler = Sampler(args.pipeline, prompts, args.guidance)
        sampler.networks["untrained"] = sampler.untrained()
        methods = [
            sampler.family.many_steps,
            *few_step_methods("teacher", sampler.family.teacher_samplers, steps),
            *(Method("untrained", 4, name) for name in sampler.family.student_samplers),
            *load_students(sampler, args.student, steps),
        ]
        judge = Judge.load(args.common / "judge")
        rows, shown = measure_all(sampler, judge, methods, args.seeds, args.columns, args.processes)
        table = format_table(rows)
        write_report(args.output, table, rows, draw_comparison(shown, prompts))
        print(table)

    return exit_status(work, "nothing was written")


def build_parser() -> Parser:
    """The flags."""
    parser = module_parser(
        "senseflow.tiny.measure",
        __doc__,
        "example: python -m senseflow.tiny.measure --pipeline assets/tiny/flux/pipeline "
        "--common assets/tiny/common --student mine=student_folder --output report",
    )
    parser.add_argument("--pipeline", type=Path, required=True, help="a diffusers pipeline folder")
    parser.add_argument(
        "--student",
        action="append",
        default=[],
        metavar="NAME=CKPT",
        help="a run folder or any checkpoint the sampling scripts take; may be repeated",
    )
    parser.add_argument(
        "--guidance",
        type=number(Guidance),
        help="the teacher's (default: 3.5 embedded for FLUX, CFG 4.5 for SD3.5, 5 for SDXL)",
    )
    parser.add_argument(
        "--steps", nargs="+", type=number(FewSteps), default=[4, 2], metavar="N",
        help="numbers of steps, 2 to 8, to draw in (4 2); all networks draw in 1 step too",
    )  # fmt: skip
    add_common_arguments(parser)
    return parser


def add_common_arguments(parser: Parser) -> None:
    """What both commands that measure take."""
    parser.add_argument("--common", type=Path, required=True, help="folder that holds judge/")
    parser.add_argument("--num_prompts", type=number(Count), default=1000)
    parser.add_argument("--seeds", type=number(SmallCount), default=3, help="pictures per prompt")
    parser.add_argument(
        "--columns", type=number(SmallCount), default=12, help="prompts in the picture"
    )
    parser.add_argument(
        "--processes", type=number(Threads), default=1, help="that draw, a thread each (1)"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write")


def write_report(output: Path, table: str, results: dict[str, Any], picture: Image.Image) -> None:
    """Write table.md, results.json and comparison.png."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "table.md").write_text(table)
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    picture.save(output / "comparison.png")


if __name__ == "__main__":
    sys.exit(main())
