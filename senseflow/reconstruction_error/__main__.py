"""Measures a teacher's one-step reconstruction error xi(t) over the noise levels.

Measure the error of a teacher's one-step prediction of x_0 from x_t, over t: mean of
||x_0 - x_0_hat(x_t, t, prompt)||^2 over the elements of real latents, raw and divided by that of
||x_0||^2. CONFIG is any recipe's YAML: its teacher, data, resolution, precision and seed are used.

Guidance 1 (the default) is the teacher's conditional prediction without guidance: with
classifier-free guidance by definition, and of an embedded guidance what it was distilled from. It
is the prediction the teacher was trained to make least errors with; guided ones are further off.

Ctrl-C loses one batch at most: the same command goes on. So does one with more --num_samples.
On several GPUs: torchrun --nproc-per-node 8 -m senseflow.reconstruction_error CONFIG ...

SenseFlow motivates intra-segment guidance with it. Results: xi.json, xi.csv, xi.png.
"""

import argparse
import logging
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
from senseflow.common.fields import MOST, Bounds, Guidance, SmallCount
from senseflow.common.files import require_writable

EXAMPLES = """examples:
  python -m senseflow.reconstruction_error configs/FLUX/flux_senseflow.yaml
  python -m senseflow.reconstruction_error configs/sdxl/sdxl_senseflow.yaml --guidance 1 --guidance 8 \\
      --num_samples 1000 --output runs/xi paths.dataset=/path/to/lmdb
"""  # noqa: E501


def main(arguments: list[str] | None = None) -> int:
    """Parse, check, measure; returns the exit status: 2 for wrong input, said in one line."""
    args = build_parser().parse_intermixed_args(arguments)

    def work() -> None:
        check(args)
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        from senseflow.reconstruction_error.run import Wanted, run  # torch and diffusers, seconds

        run(Wanted(**vars(args)))

    return exit_status(work, "measured samples are kept, the same command goes on from them")


def build_parser() -> Parser:
    """The flags."""
    parser = module_parser("senseflow.reconstruction_error", __doc__, EXAMPLES)
    add_config(parser, "YAML file of a recipe")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="folder (default: runs/xi/NAME_OF_CONFIG)"
    )
    parser.add_argument(
        "--num_samples", type=number(Annotated[int, Bounds(2, MOST)]), default=256, help="(256)"
    )
    parser.add_argument(
        "--num_times",
        type=number(Annotated[int, Bounds(2, 1000)]),
        default=40,
        help="whole thousandths, evenly spread, to 1000 (40)",
    )
    parser.add_argument(
        "--guidance", type=number(Guidance), action="append", metavar="W",
        help="of the teacher (1; Z-Image 0: without); may be repeated: a curve each",
    )  # fmt: skip
    parser.add_argument(
        "--batch_size", type=number(SmallCount), default=4, help="samples per process (4)"
    )
    return parser


def check(args: argparse.Namespace) -> None:
    """What needs no torch; raises ValueError."""
    args.guidance = args.guidance or []
    take_config(args)
    args.output = args.output or Path("runs/xi") / args.config.stem
    require_writable("--output", args.output)
    if len(set(args.guidance)) < len(args.guidance):
        raise ValueError(f"--guidance {args.guidance}: the same number twice")


if __name__ == "__main__":
    sys.exit(main())
