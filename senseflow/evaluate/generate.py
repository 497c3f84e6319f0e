"""`evaluate generate`: the teacher's images and a student's, one folder per way of drawing.

OUTPUT/teacher, and OUTPUT/student_4_x0 for 4 steps of the x0 sampler, each in the layout asked for.
"""

import argparse
import dataclasses
from pathlib import Path

from senseflow.config.families import family_of
from senseflow.evaluate.layouts import LAYOUTS, TEACHER
from senseflow.sampling.cli import add_machine_flags, check_counts, check_finite, check_paths
from senseflow.sampling.job import shard_of
from senseflow.teachers.family import Family

SAMPLERS = ("x0", "euler")


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
    what.add_argument(
        "--checkpoint", type=Path, metavar="CKPT",
        help="the student, in any form that the scripts_* take; without one, the teacher alone",
    )  # fmt: skip
    what.add_argument("--ema", action="store_true", help="the average of the student's weights")
    what.add_argument(
        "--config", type=Path, metavar="JSON", help="config.json of the student's network"
    )
    what.add_argument("--lora", type=Path, metavar="PATH", help="LoRA to add to the student")
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
        help="one prompt per line, or .json, .jsonl, .tsv with ids; t2i_compbench: the files of "
        "its categories, such as color_val.txt",
    )  # fmt: skip
    group.add_argument("--start_idx", type=int, default=0, help="first prompt of the file (0)")
    group.add_argument("--num_prompts", type=int, help="at most this many (all)")
    group.add_argument(
        "--layout", choices=tuple(LAYOUTS), default="seeds",
        help="of the folders: seed_0/00000_words.png, ... (seeds), or the official one of a "
        "benchmark",
    )  # fmt: skip
    group.add_argument("--output_dir", type=Path, required=True, metavar="DIR")
    group.add_argument("--overwrite", action="store_true", help="make existing images again")


def _add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument("--samplers", nargs="+", choices=SAMPLERS, default=["x0"], help="(x0)")
    group.add_argument(
        "--steps", nargs="+", type=int, metavar="N",
        help="of the student: 1, 2, 4 or 8 (as many as it was trained for)",
    )  # fmt: skip
    group.add_argument(
        "--two_steps", choices=("spread", "first"), default="spread",
        help="2 steps: anchors 1 and 3, or the first two",
    )  # fmt: skip
    group.add_argument("--teacher_steps", type=int, help="(the family's: FLUX 50, SDXL 40, ...)")
    group.add_argument("--teacher_guidance", type=float, help="(the family's)")
    group.add_argument(
        "--guidance", type=float, help="of a FLUX student that kept its guidance embedding"
    )
    numbers = ", ".join(f"{name} {layout.num_seeds}" for name, layout in LAYOUTS.items())
    group.add_argument("--seeds", type=int, help=f"images per prompt ({numbers})")
    group.add_argument(
        "--seed", type=int, default=0, help="image k of prompt i has seed + i + 1000000 k (0)"
    )
    group.add_argument(
        "--teacher_seed", type=int, help="in place of --seed for the teacher (the same)"
    )
    group.add_argument("--height", type=int, help="pixels (the student's trained size)")
    group.add_argument("--width", type=int)
    group.add_argument("--batch_size", type=int, default=1)
    group.add_argument("--max_sequence_length", type=int, help="T5 tokens")


def run(args: argparse.Namespace) -> None:
    """Draw what is missing; raises ValueError for input that cannot be used."""
    family = dataclasses.replace(
        family_of(args.base, "--base"), base_flag="--base", config_flag="--config"
    )
    check(family, args)
    layout = LAYOUTS[args.layout]
    collections = layout.read(args.prompts_file)
    from senseflow.evaluate.drawing import draw_folders  # torch and diffusers, seconds

    draw_folders(family, args, layout, collections)


def check(family: Family, args: argparse.Namespace) -> None:
    """What needs no torch; raises ValueError."""
    if args.no_teacher and not args.checkpoint:
        raise ValueError("--no_teacher leaves nothing to draw without --checkpoint")
    for flag in ("ema", "config", "lora"):
        if getattr(args, flag) and not args.checkpoint:
            raise ValueError(f"--{flag} is of a student: name its --checkpoint")
    if args.steps and min(args.steps) < 1:
        raise ValueError(f"--steps {min(args.steps)} must be at least 1")
    if args.name == TEACHER or Path(args.name).name != args.name or args.name.startswith("."):
        raise ValueError(f"--name {args.name} does not name a folder of a student")
    check_counts(args, "num_prompts", "batch_size", "seeds", "teacher_steps", "max_sequence_length")
    check_counts(args, "start_idx", "seed", "teacher_seed", least=0)
    check_finite(args, "guidance", "teacher_guidance")
    if family.tokenizer is None and args.max_sequence_length:
        raise ValueError(f"--max_sequence_length: {family.title} has no T5")
    check_paths(family, args)
    shard_of(args.shard)
