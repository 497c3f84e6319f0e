"""The command line that all scripts_* share: flags, and checks that need no torch."""

import argparse
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from senseflow.common.commands import Number, Parser, exit_status, number
from senseflow.common.environment import own_position
from senseflow.common.fields import (
    Bounds,
    Count,
    CountOrNone,
    Guidance,
    Pixels,
    Seed,
    Share,
    SmallCount,
    flag_names,
)
from senseflow.common.files import ROOT, require_writable
from senseflow.common.tables import TEXT_COLUMNS
from senseflow.config.families import check_base
from senseflow.sampling.drawing import (
    DTYPES,
    MOST_STEPS,
    SAMPLERS,
    TWO_STEPS,
    Drawing,
    Machine,
    Paths,
)
from senseflow.sampling.job import Output, Prompt, shard_of
from senseflow.sampling.prompts import FILES, checked_prompt, chosen, read_prompts_file
from senseflow.teachers.family import Family

logger = logging.getLogger("senseflow")

PROMPTS_FILE = "senseflow_test_prompts.txt"
NUM_PROMPTS = 23
Steps = Annotated[int, Bounds(1, MOST_STEPS)]
STOPPED = "finished images are kept, the same command goes on from them"


def main(family: Family, arguments: list[str] | None = None, folder: str | None = None) -> int:
    """Parse, check, sample; returns the exit status: 2 for wrong input, said in one line.

    folder: in `outputs`, where images go by default; None: named like the family.
    """
    parser = build_parser(family, folder or family.name)
    args = parser.parse_args(arguments)

    def work() -> None:
        flags = flag_names(levels=family.levels.flag, config=family.config_flag)
        with flags, messages():
            paths, drawing = read_paths(family, args), read_drawing(family, args)
            machine, output = read_machine(args), read_output(args)
            prompts = read_prompts(args)[output.shard[0] :: output.shard[1]]
            from senseflow.sampling.generate import generate  # torch and diffusers, seconds

            generate(family, paths, drawing, machine, prompts, output)

    return exit_status(work, STOPPED)


def build_parser(family: Family, folder: str) -> Parser:
    """The flags of the README, and more; folder: as `main` has it."""
    parser = Parser(
        description=f"Sample images from a student of {family.title}, or, with --teacher, from the "
        "teacher itself.",
        epilog=f"example: %(prog)s {family.base_flag} /path/to/base --checkpoint /path/to/run "
        "--output_dir ./outputs",
    )
    paths = parser.add_argument_group("what")
    paths.add_argument(
        family.base_flag, dest="base", type=Path, required=True, metavar="DIR",
        help=f"diffusers folder of {family.title}: text encoders, VAE, scheduler",
    )  # fmt: skip
    add_student_flags(paths, [family.config_flag], _default_config(family))
    add_lora_flags(paths)
    paths.add_argument(
        "--teacher", action="store_true",
        help="sample the base itself with its own schedule: references for FID-T",
    )  # fmt: skip
    _add_prompt_flags(parser, Path("outputs") / folder)
    _add_sampling_flags(parser, family)
    add_machine_flags(parser)
    return parser


def _add_prompt_flags(parser: Parser, folder: Path) -> None:
    group = parser.add_argument_group("prompts")
    group.add_argument("--prompt", action="append", metavar="TEXT", help="may be repeated")
    group.add_argument(
        "--prompts_file", type=Path, metavar="FILE",
        help=f"{FILES} (default: {PROMPTS_FILE})",
    )  # fmt: skip
    add_column_flag(group)
    group.add_argument(
        "--num_prompts",
        type=number(Count),
        default=NUM_PROMPTS,
        help=f"at most this many ({NUM_PROMPTS})",
    )
    # A folder for each script: images of two recipes have the same names.
    group.add_argument("--output_dir", type=Path, default=folder, help=f"(./{folder})")
    add_work_flags(group)


def add_student_flags(group: argparse._ArgumentGroup, config: list[str], default: str) -> None:
    """Which student; config: the flags of its config.json, and what is taken without one."""
    group.add_argument(
        "--checkpoint", type=Path, metavar="CKPT",
        help="the student: run folder, student or checkpoint step, diffusers component or "
        "pipeline folder, LoRA folder, .safetensors (one, or an index of shards), or .pth with "
        "weights, bare or under 'model' or 'ema_model'",
    )  # fmt: skip
    group.add_argument(
        "--ema", action="store_true",
        help="the average of the student's weights (runs with ema.decay, .pth with 'ema_model')",
    )  # fmt: skip
    group.add_argument(
        *config, dest="config", type=Path, metavar="JSON",
        help=f"config.json of the student's network (default: {default})",
    )  # fmt: skip


def add_column_flag(group: argparse._ArgumentGroup) -> None:
    """Which column of a table holds its prompts."""
    group.add_argument(
        "--prompts_column", metavar="NAME",
        help=f"of a table's prompts (the first of {', '.join(TEXT_COLUMNS)})",
    )  # fmt: skip


def add_lora_flags(group: argparse._ArgumentGroup) -> None:
    """A LoRA on top."""
    group.add_argument("--lora", type=Path, metavar="PATH", help="LoRA folder or file to add")
    group.add_argument(
        "--lora_partial", action="store_true",
        help="also a LoRA of which a part fits nowhere; which is said",
    )  # fmt: skip


def add_work_flags(group: argparse._ArgumentGroup) -> None:
    """Where the prompts begin, and what is drawn at once and again."""
    group.add_argument(
        "--start_idx", type=number(CountOrNone), default=0, help="first prompt of the file (0)"
    )
    group.add_argument("--overwrite", action="store_true", help="make existing images again")
    group.add_argument(
        "--batch_size", type=number(SmallCount), default=1, help="images drawn at once (1)"
    )


def add_size_flags(group: argparse._ArgumentGroup) -> None:
    """What the scripts and `evaluate generate` say of a drawing in the same words."""
    group.add_argument(
        "--two_steps", choices=TWO_STEPS, default="spread",
        help="2 steps: anchors 1 and 3, or the first two",
    )  # fmt: skip
    group.add_argument(
        "--height", type=number(Pixels), help="pixels (default: trained size, or the base's)"
    )
    group.add_argument("--width", type=number(Pixels))


def _default_config(family: Family) -> str:
    base = family.base_flag.removeprefix("--")
    said = f"the checkpoint's own; else <{base}>/{family.component}/config.json"
    if family.last_config:
        said += f", fitted to the weights; else {family.last_config.relative_to(ROOT)}"
    return said


def _add_sampling_flags(parser: Parser, family: Family) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--steps", type=number(Steps),
        help="as many as the trained anchors (default), a divisor, or twice as many: 1, 2, 4 or 8 "
        f"of 4 anchors; teacher: any ({family.teacher_steps})",
    )  # fmt: skip
    add_size_flags(group)
    group.add_argument(
        family.levels.flag, dest="levels", nargs="+", metavar="X",
        type=Number(family.levels.number, Bounds(0, 1000)),
        help="in place of --steps: which of the trained anchors, falling from the first",
    )  # fmt: skip
    group.add_argument(
        "--sampler",
        choices=SAMPLERS,
        help="(default: x0, or cps as rewards trained it; with --teacher: euler)",
    )
    group.add_argument(
        "--eta", type=number(Share), metavar="X", help="of --sampler cps: 0 is euler, 1 is x0"
    )
    group.add_argument(
        "--guidance",
        type=number(Guidance),
        help=f"guidance of the teacher ({family.teacher_guidance:g})",
    )
    group.add_argument("--seed", type=number(Seed), default=0, help="image i has seed + i (0)")
    if family.tokenizer:
        group.add_argument(
            "--max_sequence_length", type=number(SmallCount),
            help="tokens of a prompt (default: the trained number, or what the base states)",
        )  # fmt: skip
    else:
        parser.set_defaults(max_sequence_length=None)


def add_machine_flags(parser: argparse.ArgumentParser) -> None:
    """Where and in which precision to draw, and which share of the work."""
    group = add_device_flags(parser)
    group.add_argument("--compile", action="store_true", help="torch.compile the network's blocks")
    group.add_argument(
        "--shard", metavar="I/N",
        help="every N-th prompt from the I-th, I < N (default: RANK/WORLD_SIZE of torchrun)",
    )  # fmt: skip


def add_device_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Where and in which precision to draw."""
    group = parser.add_argument_group("machine")
    group.add_argument("--dtype", choices=DTYPES, help="(GPU: bfloat16, CPU: float32)")
    group.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    group.add_argument("--offload", action="store_true", help="keep idle parts in host memory")
    return group


def read_paths(family: Family, args: argparse.Namespace) -> Paths:
    """Which weights draw; raises ValueError for files that are not there, or of another family."""
    if args.teacher and args.checkpoint:
        raise ValueError("--teacher samples the base itself: leave out --checkpoint")
    if not args.teacher and not args.checkpoint:
        raise ValueError("--checkpoint is missing (or say --teacher to sample the base itself)")
    check_base(family, args.base)
    return Paths(args.base, args.checkpoint, args.ema, args.config, args.lora, args.lora_partial)


def read_drawing(family: Family, args: argparse.Namespace) -> Drawing:
    """How it is drawn; raises ValueError for what nothing can draw."""
    if args.levels and args.teacher:
        raise ValueError(f"{family.levels.flag} and --teacher exclude each other")
    return Drawing(
        steps=args.steps,
        sampler=args.sampler,
        eta=args.eta,
        levels=tuple(args.levels) if args.levels else None,
        two_steps=args.two_steps,
        guidance=args.guidance,
        height=args.height,
        width=args.width,
        max_sequence_length=args.max_sequence_length,
        seed=args.seed,
    )


def read_machine(args: argparse.Namespace) -> Machine:
    """The flags of `add_machine_flags`, but for the share."""
    return Machine(args.device, args.dtype, args.offload, args.compile)


def read_output(args: argparse.Namespace) -> Output:
    """Where images go; raises ValueError for a folder that cannot be written, or no share."""
    require_writable("--output_dir", args.output_dir)
    silent = not args.shard and own_position().rank > 0  # one bar of all ranks
    shard = shard_of(args.shard)
    return Output(args.output_dir, args.overwrite, args.batch_size, shard, silent)


def read_prompts(args: argparse.Namespace) -> list[Prompt]:
    """The prompts asked for, numbered as in their file (blank lines do not count)."""
    if args.prompt and args.prompts_file:
        raise ValueError("--prompt and --prompts_file exclude each other")
    if args.prompts_column and not args.prompts_file:
        raise ValueError("--prompts_column is of a table: name its --prompts_file")
    if args.prompt:
        texts = [checked_prompt("--prompt", text) for text in args.prompt]
        return [Prompt(index, text) for index, text in enumerate(texts)]
    file = args.prompts_file or Path(PROMPTS_FILE)
    if not args.prompts_file and not file.is_file():
        file = ROOT / PROMPTS_FILE
    prompts = read_prompts_file(file, named=args.prompts_column)
    drawn = chosen(prompts, file, args.start_idx, args.num_prompts)
    if len(drawn) < len(prompts):
        logger.info(
            "%d of the %d are drawn, from number %d on; --num_prompts and --start_idx say which",
            len(drawn), len(prompts), args.start_idx,
        )  # fmt: skip
    return drawn


@contextmanager
def messages() -> Iterator[None]:
    """Our own messages on stderr; no warnings of the libraries' imports, no loading bars."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    level, propagate = logger.level, logger.propagate
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate
