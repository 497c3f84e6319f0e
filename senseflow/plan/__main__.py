"""Says what a run needs before anything is rented: memory, communication, work, time.

Trace the training iteration of a configuration at full size, without a GPU and without weights:
the run's own code builds its networks, shards them over NODES x GPUS ranks and takes whole
iterations on tensors that have shapes and no numbers. It says what each network and each phase of
an iteration needs on a GPU, whether the worst iteration fits, what to change if not, and how long a
run takes at a stated share of the GPUs' peak (MFU).

The teacher is paths.pretrained_model where that folder is there (its config.json files are enough),
else the recipe's teacher as published. Minutes on two CPU cores; Ctrl-C leaves nothing behind.

Exit status: 0; with --fit 1 when nothing makes it fit; 2 for wrong input.
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
from senseflow.config.config import load_config
from senseflow.config.recipes import RECIPES
from senseflow.plan.reserve import reserve

Gib = Annotated[float, Bounds(0, 1e5)]
Small = Annotated[float, Bounds(0, 1e4, above=True)]
EXAMPLES = """examples:
  python -m senseflow.plan --config configs/FLUX/flux_senseflow.yaml --gpus 8 --memory 80
  python -m senseflow.plan --config configs/SD35/sd35_senseflow.yaml --gpus 1 --output plan.md \\
      train.batch_size=1 precision.vae=bfloat16
  python -m senseflow.plan --config configs/FLUX/flux_senseflow_lora.yaml --gpus 1 --memory 24 --fit
  python -m senseflow.plan --table --output table.md
  python -m senseflow.plan --cards --output cards.md
"""


def main(arguments: list[str] | None = None) -> int:
    """Parse, check, trace; returns the exit status."""
    args = build_parser().parse_intermixed_args(arguments)

    def work() -> int:
        check(args)
        logging.basicConfig(level=logging.ERROR, format="%(message)s")
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a plan is the same with a GPU and without
        if args.cards:
            make_cards(args)
            return 0
        text, status = make_text(args)
        if args.output:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            write_whole(args.output, text)
        else:
            sys.stdout.write(text)
        return status

    return exit_status(work, "nothing was written")


def make_text(args: argparse.Namespace) -> tuple[str, int]:
    """The plan, with --fit that of what fits, or with --table that of all recipes; exit status."""
    from senseflow.plan.command import whole_fit, whole_plan, whole_table  # torch, diffusers
    from senseflow.plan.costs import Gpu
    from senseflow.plan.plan import Wanted

    gpu = Gpu(args.memory, args.mfu, args.reserve)
    files, overrides = recipe_files(args), tuple(args.overrides)
    wanted = [Wanted(file, overrides, args.nodes, args.gpus, args.data) for file in files]
    if args.table:
        return whole_table(wanted, gpu), 0
    host = (args.op_us and args.op_us / 1e6, args.unit_ms and args.unit_ms / 1e3)
    as_json = bool(args.output and args.output.suffix == ".json")
    if args.fit:
        text, fits = whole_fit(wanted[0], gpu, host, as_json)
        return text, 0 if fits else 1
    return whole_plan(wanted[0], gpu, host, as_json), 0


def make_cards(args: argparse.Namespace) -> None:
    """The page of all recipes on several cards, which it writes itself, as it goes."""
    from senseflow.plan.cards import whole_cards  # torch, diffusers
    from senseflow.plan.costs import Gpu

    logging.getLogger("senseflow.plan.cards").setLevel(logging.INFO)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    whole_cards(recipe_files(args), args.output, Gpu(args.memory, args.mfu, args.reserve))


def recipe_files(args: argparse.Namespace) -> list[Path]:
    """The YAML that was named, or those of all recipes that can have one sample on each GPU: not
    of rewards, which compare those of a group."""
    if args.config:
        return [args.config]
    files = [ROOT / recipe.config for recipe in RECIPES.values()]
    return [file for file in files if not load_config(file).reward.in_use]


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
        "--reserve", type=number(Gib), metavar="GIB",
        help="of that, what no tensor gets: CUDA context, work spaces, NCCL, fragmentation, from 0 "
        f"to below --memory ({reserve(1):g} on one GPU, {reserve(2):g} on each of several, "
        f"{reserve(2, 2):g} with parallel.replicas)",
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
        "--data", choices=("images", "latents", "cached", "prompts"),
        help="images, an LMDB of latents, images with prompts and latents from a cache, or prompts "
        "alone (default: as the configuration's: latents for SDXL, else images)",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help=".md or .json (default: markdown on stdout)"
    )
    parser.add_argument(
        "--fit",
        action="store_true",
        help="first the smallest set of changes with which it fits, the cheapest first, as "
        "overrides; each is traced",
    )
    parser.add_argument(
        "--table", action="store_true",
        help="instead, all five recipes (or CONFIG's) on 1, 2, 4, 8 and 16 GPUs, a sample on each",
    )  # fmt: skip
    parser.add_argument(
        "--cards", action="store_true",
        help="instead, for every recipe (or CONFIG) the least that has to be changed for 1, 2, 4 "
        "and 8 cards of 24 to 141 GB: hours; goes on where it was, by a .json beside --output",
    )  # fmt: skip
    return parser


def check(args: argparse.Namespace) -> None:
    """What needs no torch; raises ValueError."""
    take_config(args, required=not (args.table or args.cards))
    if args.fit and args.table:
        raise ValueError("--fit is of one configuration, --table of many: say one of them")
    if args.cards and (args.fit or args.table):
        raise ValueError("--cards is a page of its own: leave out --fit and --table")
    if args.cards and (args.output is None or args.output.suffix != ".md"):
        raise ValueError("--cards needs --output FILE.md, beside which it keeps what it has traced")
    if args.cards and args.overrides:
        raise ValueError(f"--cards changes keys itself: leave out {' '.join(args.overrides)}")
    ranks = 1 if args.table or args.cards else args.nodes * args.gpus
    if args.reserve is None and not (kept := reserve(ranks)) < args.memory:
        raise ValueError(
            f"--memory {args.memory:g} must be above {kept:g}, which is kept for what no tensor "
            "gets; --reserve says another figure"
        )
    if args.reserve is not None and not args.reserve < args.memory:
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
