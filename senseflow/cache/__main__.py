"""Computes prompt embeddings and latents once, so that training loads no text encoder.

Compute, once, what a run's frozen encoders say of its data set: of every distinct prompt the
teacher's embeddings and, for the vfm adversary, CLIP's feature; of every image the mean and
standard deviation of the VAE's posterior. CONFIG is any recipe's YAML: its teacher, data,
resolution and precision are used. A run with paths.cache: DIR then loads no text encoder and
encodes no image.

Ctrl-C loses one file per process at most: the same command goes on. With a larger data set it adds
what is missing. Data that are latents already (an LMDB) need no cache of them.
On several GPUs: torchrun --nproc-per-node 8 -m senseflow.cache CONFIG ...
"""

import argparse
import logging
import sys
from pathlib import Path

from senseflow.common.commands import (
    Parser,
    add_config,
    exit_status,
    module_parser,
    number,
    take_config,
)
from senseflow.common.fields import Count
from senseflow.common.files import require_own, require_writable

INDEX = "index.json"  # as `senseflow.data.cache_index`, which imports torch
EXAMPLES = """examples:
  python -m senseflow.cache configs/FLUX/flux_senseflow.yaml --output /data/flux_cache \\
      paths.pretrained_model=/path/to/FLUX.1-dev paths.dataset=/path/to/dataset.json
  python -m senseflow.cache configs/sdxl/sdxl_dmd2.yaml --output /data/sdxl_cache --prompts
"""


def main(arguments: list[str] | None = None) -> int:
    """Parse, check, encode; returns the exit status: 2 for wrong input, said in one line."""
    args = build_parser().parse_intermixed_args(arguments)

    def work() -> None:
        check(args)
        # the libraries' own notes stay unsaid, such as that CLIP, whose shapes alone are asked for
        # first, "is initialized randomly"
        logging.basicConfig(level=logging.ERROR, format="%(message)s")
        logging.getLogger("senseflow").setLevel(logging.INFO)
        from senseflow.cache.run import Wanted, run  # torch and diffusers, seconds

        run(Wanted(**vars(args)))

    return exit_status(work, "finished files are kept, the same command goes on from them")


def build_parser() -> Parser:
    """The flags."""
    parser = module_parser("senseflow.cache", __doc__, EXAMPLES)
    add_config(parser, "YAML file of a recipe")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the cache")
    parser.add_argument("--prompts", action="store_true", help="prompts alone")
    parser.add_argument("--latents", action="store_true", help="latents alone")
    parser.add_argument(
        "--shard_rows", type=number(Count), metavar="N",
        help="rows per file (as many as fit 256 MiB, at most 1024)",
    )  # fmt: skip
    return parser


def check(args: argparse.Namespace) -> None:
    """What needs no torch; raises ValueError."""
    take_config(args)
    require_writable("--output", args.output)
    require_own("--output", args.output, INDEX)
    if args.prompts and args.latents:
        raise ValueError("--prompts and --latents: one of them, or neither for both")


if __name__ == "__main__":
    sys.exit(main())
