"""From the flags of the three commands to what they do; the flags of `generate`."""

import argparse
import os
from dataclasses import replace
from pathlib import Path

from senseflow.common.commands import number
from senseflow.common.fields import (
    Count,
    Guidance,
    PathText,
    Seed,
    Share,
    SmallCount,
    check,
    flag_names,
)
from senseflow.config.families import family_of
from senseflow.distill.scorers.metric import Given
from senseflow.evaluate.layouts import LAYOUTS, TEACHER, Selection
from senseflow.evaluate.metrics import specs
from senseflow.evaluate.score import check_flags
from senseflow.evaluate.table import make_table
from senseflow.sampling.cli import (
    Steps,
    add_column_flag,
    add_lora_flags,
    add_machine_flags,
    add_size_flags,
    add_student_flags,
    add_work_flags,
    read_machine,
    read_output,
)
from senseflow.sampling.drawing import CPS, SAMPLERS, Drawing, Paths
from senseflow.sampling.prompts import FILES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `generate`."""
    parser.epilog = (
        "example: %(prog)s --base /path/to/FLUX.1-dev --checkpoint runs/flux "
        "--prompts_file coco5k.txt --samplers x0 euler --steps 4 2 1 --output_dir evaluation"
    )
    what = parser.add_argument_group("what")
    what.add_argument(
        "--base", type=Path, required=True, metavar="DIR",
        help="the teacher's diffusers folder; its model_index.json tells the family",
    )  # fmt: skip
    add_student_flags(what, ["--config"], "the checkpoint's own, else the base's")
    add_lora_flags(what)
    what.add_argument("--no_teacher", action="store_true", help="draw the student alone")
    what.add_argument(
        "--name", default="student", help="begins the names of the student's folders (student)"
    )
    _add_prompt_flags(parser)
    _add_sampling_flags(parser)
    add_machine_flags(parser)


def _add_prompt_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("prompts")
    group.add_argument(
        "--prompts_file", type=Path, required=True, nargs="+", metavar="FILE",
        help=f"{FILES}; t2i_compbench: the files of its categories, such as color_val.txt",
    )  # fmt: skip
    add_column_flag(group)
    group.add_argument("--num_prompts", type=number(Count), help="at most this many (all)")
    group.add_argument(
        "--layout", choices=tuple(LAYOUTS), default="seeds",
        help="of the folders: seed_0/00000_words.png, ... (seeds), or the official one of a "
        "benchmark",
    )  # fmt: skip
    group.add_argument("--output_dir", type=Path, required=True, metavar="DIR")
    add_work_flags(group)


def _add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--samplers", nargs="+", choices=SAMPLERS,
        help="of the student (default: x0, or cps as rewards trained it)",
    )  # fmt: skip
    group.add_argument(
        "--eta", nargs="+", type=number(Share), metavar="X", help="of cps: 0 is euler, 1 is x0"
    )
    group.add_argument(
        "--steps", nargs="+", type=number(Steps), metavar="N",
        help="of the student: as many as its anchors (default), a divisor, or twice as many",
    )  # fmt: skip
    add_size_flags(group)
    group.add_argument(
        "--teacher_steps", type=number(Steps), help="(the family's: FLUX 50, SDXL 40, ...)"
    )
    group.add_argument("--teacher_guidance", type=number(Guidance), help="(the family's)")
    group.add_argument(
        "--guidance",
        type=number(Guidance),
        help="of a FLUX student that kept its guidance embedding",
    )
    numbers = ", ".join(f"{name} {layout.num_seeds}" for name, layout in LAYOUTS.items())
    group.add_argument("--seeds", type=number(SmallCount), help=f"images per prompt ({numbers})")
    group.add_argument(
        "--seed",
        type=number(Seed),
        default=0,
        help="image k of prompt i has seed + i + 1000000 k (0)",
    )
    group.add_argument(
        "--teacher_seed", type=number(Seed), help="in place of --seed for the teacher (the same)"
    )
    group.add_argument("--max_sequence_length", type=number(SmallCount), help="tokens of a prompt")


def run_generate(args: argparse.Namespace) -> None:
    """Draw what is missing; raises ValueError for input that cannot be used."""
    family = family_of(args.base, "--base")
    if args.no_teacher and not args.checkpoint:
        raise ValueError("--no_teacher leaves nothing to draw without --checkpoint")
    if args.lora and not args.checkpoint:
        raise ValueError("--lora is of a student: name its --checkpoint")
    check("name", args.name, PathText())
    if args.name == TEACHER or Path(args.name).name != args.name or args.name.startswith("."):
        raise ValueError(f"--name {args.name} does not name a folder of a student")
    paths = Paths(args.base, args.checkpoint, args.ema, args.config, args.lora, args.lora_partial)
    drawings, teacher = read_drawings(args)
    machine, output = read_machine(args), read_output(args)
    layout = LAYOUTS[args.layout]
    collections = layout.read(args.prompts_file, args.prompts_column)
    num_seeds = args.seeds or layout.num_seeds
    selection = Selection(layout, collections, num_seeds, args.start_idx, args.num_prompts)
    from senseflow.evaluate.generate import draw_folders  # torch and diffusers, seconds

    draw_folders(family, paths, args.name, drawings, teacher, selection, machine, output)


def read_drawings(args: argparse.Namespace) -> tuple[list[Drawing], Drawing | None]:
    """The student's, one for each number of steps and sampler, and of cps for each eta; the
    teacher's, if it is drawn."""
    samplers = args.samplers or [None]  # the student's own
    if args.eta and CPS not in samplers:
        raise ValueError("--eta is of the sampler cps: name it among --samplers, or leave it out")
    length = args.max_sequence_length
    both = Drawing(height=args.height, width=args.width, max_sequence_length=length, seed=args.seed)
    student = replace(both, two_steps=args.two_steps, guidance=args.guidance)
    drawings = [
        replace(student, steps=steps, sampler=sampler, eta=eta)
        for steps in dict.fromkeys(args.steps or [None])
        for sampler in dict.fromkeys(samplers)
        for eta in dict.fromkeys((sampler == CPS and args.eta) or [None])
    ]
    flags = {"steps": "--teacher_steps", "guidance": "--teacher_guidance"}
    with flag_names(**flags, seed="--teacher_seed"):
        seed = args.seed if args.teacher_seed is None else args.teacher_seed
        teacher = replace(both, steps=args.teacher_steps, guidance=args.teacher_guidance, seed=seed)
    return drawings if args.checkpoint else [], None if args.no_teacher else teacher


def run_score(args: argparse.Namespace) -> None:
    """Check, measure, write; raises ValueError for what cannot be measured."""
    metrics = [spec for name in args.metrics for spec in specs.METRICS if spec.name == name]
    given = Given(vars(args))
    if not args.name.strip():
        raise ValueError("--name is empty")
    if args.output.is_dir():
        raise ValueError(f"--output {args.output} is a folder: name a file")
    check_flags(metrics, given)
    # timm, open_clip and transformers would fetch what they lack
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        from senseflow.evaluate.measure import Scoring, score  # torch, seconds

        score(
            Scoring(
                name=args.name,
                output=args.output,
                metrics=metrics,
                given=given,
                mixed_sizes=args.mixed_sizes,
                again=args.again,
                device=args.device,
                dtype=args.dtype,
                batch_size=args.batch_size,
                threads=args.threads,
            )
        )
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{error.name} is not installed: pip install -r requirements.txt"
        ) from error


def run_table(args: argparse.Namespace) -> None:
    """Put results together; raises ValueError for files that are not what they should be."""
    make_table(args.results, args.geneval, args.t2i_compbench, args.published, args.output_dir)
