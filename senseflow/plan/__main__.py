"""Says what a run needs before anything is rented: memory, communication, work, time.

Trace the training iteration of a configuration at full size, without a GPU and without weights:
the run's own code builds its networks, shards them over NODES x GPUS ranks and takes whole
iterations on tensors that have shapes and no numbers. It says what each network and each phase of
an iteration needs on a GPU, whether the worst iteration fits, what to change if not, and how long a
run takes at a stated share of the GPUs' peak (MFU).

The teacher is paths.pretrained_model where that folder is there (its config.json files are enough),
else the recipe's teacher as published. Minutes on two CPU cores; Ctrl-C leaves nothing behind.
"""

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import Annotated

from senseflow.common.commands import (
    Parser,
    add_config,
    exit_status,
    module_parser,
    number,
    take_config,
)
from senseflow.common.fields import Bounds, Fraction, SmallCount, Threads
from senseflow.common.files import ROOT, require_writable, write_whole
from senseflow.config.recipes import RECIPES

Gib = Annotated[float, Bounds(0, 1e5)]
Small = Annotated[float, Bounds(0, 1e4, above=True)]
EXAMPLES = """examples:
  python -m senseflow.plan --config configs/FLUX/flux_senseflow.yaml --gpus 8 --memory 80
  python -m senseflow.plan --config configs/SD35/sd35_senseflow.yaml --gpus 1 --output plan.md \\
      train.batch_size=1 precision.vae=bfloat16
  python -m senseflow.plan --table --output table.md
"""


def main(arguments: list[str] | None = None) -> int:
    """Parse, check, trace; returns the exit status: 2 for wrong input, said in one line."""
    args = build_parser().parse_intermixed_args(arguments)

    def work() -> None:
        check(args)
        logging.basicConfig(level=logging.ERROR, format="%(message)s")
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a plan is the same with a GPU and without
        text = make_text(args)
        if args.output:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            write_whole(args.output, text)
        else:
            sys.stdout.write(text)

    return exit_status(work, "nothing was written")


def make_text(args: argparse.Namespace) -> str:
    """The plan, or with --table that of all recipes."""
    from senseflow.plan.command import whole_plan, whole_table  # torch and diffusers, seconds
    from senseflow.plan.costs import Gpu
    from senseflow.plan.plan import Wanted

    gpu = Gpu(args.memory, args.reserve, args.mfu)
    files = [args.config] if args.config else [ROOT / r.config for r in RECIPES.values()]
    overrides = tuple(args.overrides)
    wanted = [Wanted(file, overrides, args.nodes, args.gpus, args.data) for file in files]
    if args.table:
        return whole_table(wanted, gpu)
    host = (args.op_us and args.op_us / 1e6, args.unit_ms and args.unit_ms / 1e3)
    return whole_plan(wanted[0], gpu, host, bool(args.output and args.output.suffix == ".json"))


def build_parser() -> Parser:
    """The flags."""
    parser = module_parser("senseflow.plan", __doc__, EXAMPLES)
    add_config(parser, "YAML file of a recipe")
    parser.add_argument("--nodes", type=number(SmallCount), default=1, help="(1)")
    parser.add_argument("--gpus", type=number(Threads), default=8, help="of each node (8)")
    parser.add_argument(
        "--memory", type=number(Gib), default=80, metavar="GIB", help="of a GPU (80)"
    )
    parser.add_argument(
        "--reserve", type=number(Gib), default=6, metavar="GIB",
        help="of that, what no tensor gets: CUDA context, NCCL, work space, fragmentation (6)",
    )  # fmt: skip
    parser.add_argument(
        "--mfu", type=number(Fraction), default=0.4,
        help="share of the GPU's dense bfloat16 peak that training reaches (0.4)",
    )  # fmt: skip
    parser.add_argument(
        "--op-us", type=number(Small), metavar="US",
        help="CPU time that an operation costs the host (default: measured here, in a second)",
    )  # fmt: skip
    parser.add_argument(
        "--unit-ms", type=number(Small), metavar="MS",
        help="CPU time that gathering a unit costs the host besides (default: measured here)",
    )  # fmt: skip
    parser.add_argument(
        "--data", choices=("images", "latents", "cached"),
        help="images, an LMDB of latents, or images with prompts and latents from a cache "
        "(default: as the recipe's: latents for SDXL, else images)",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help=".md or .json (default: markdown on stdout)"
    )
    parser.add_argument(
        "--table", action="store_true",
        help="instead, all five recipes (or CONFIG's) on 1, 2, 4, 8 and 16 GPUs, a sample on each",
    )  # fmt: skip
    return parser


def check(args: argparse.Namespace) -> None:
    """What needs no torch; raises ValueError."""
    take_config(args, required=not args.table)
    if not args.reserve < args.memory:
        raise ValueError(f"--reserve {args.reserve:g} must be below --memory {args.memory:g}")
    if args.output and args.output.suffix not in (".md", ".json"):
        raise ValueError(f"--output {args.output} must end in .md or .json")
    if args.output and args.output.is_dir():
        raise ValueError(f"--output {args.output} is a folder")
    if args.table and args.output and args.output.suffix == ".json":
        raise ValueError("--table is markdown: --output must end in .md")
    if args.output:
        require_writable("--output", args.output.parent)


if __name__ == "__main__":
    sys.exit(main())
