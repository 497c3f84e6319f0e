"""Extracts a LoRA from a full student: a truncated SVD of how its weights differ from the base's.

Write pytorch_lora_weights.safetensors, which stock diffusers pipelines load on the base, from a
student that was trained in full: of every linear layer and convolution, the best approximation of
rank R to student minus base (truncated SVD). It says how much of the difference's energy (the sum
of squares) is kept, and what no LoRA can hold: biases, norms, and tensors that only one of the two
networks has. The folder appears whole or not at all.

It needs no GPU (but --device cuda is faster) and holds one layer at a time in memory.
"""

import argparse
import logging
import sys
from pathlib import Path

from senseflow.common.commands import Parser, exit_status, module_parser, number
from senseflow.common.fields import SmallCount
from senseflow.common.files import require_writable
from senseflow.config.families import family_of

EXAMPLE = """example:
  python -m senseflow.extract_lora --base /path/to/FLUX.1-dev --student runs/flux --rank 64 \\
      --output flux_lora
"""


def main(arguments: list[str] | None = None) -> int:
    """Parse, check, extract; returns the exit status: 2 for wrong input, said in one line."""
    args = build_parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return exit_status(lambda: run(args), "nothing was written")


def build_parser() -> Parser:
    """The flags."""
    parser = module_parser("senseflow.extract_lora", __doc__, EXAMPLE)
    parser.add_argument(
        "--base", type=Path, required=True, metavar="DIR", help="the teacher's diffusers folder"
    )
    parser.add_argument(
        "--student", type=Path, required=True, metavar="CKPT",
        help="the full student, in any form that --checkpoint of the sampling scripts takes",
    )  # fmt: skip
    parser.add_argument("--rank", type=number(SmallCount), required=True, help="of every layer")
    parser.add_argument(
        "--skip", nargs="+", default=[], metavar="LAYER",
        help="ends of the names of layers to leave out: norm_out.linear of FLUX, for InvokeAI",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="must not be there yet"
    )
    parser.add_argument("--ema", action="store_true", help="the average of the student's weights")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32")
    parser.add_argument("--device", default="cpu", help="where the SVDs are taken (default: cpu)")
    return parser


def run(args: argparse.Namespace) -> None:
    """Raises ValueError for what cannot be extracted, OSError for what cannot be written."""
    if args.output.exists():
        raise ValueError(f"--output {args.output} is there already: name another, or remove it")
    require_writable("--output", args.output.parent)
    family = family_of(args.base, "--base")
    # torch and diffusers, seconds
    from senseflow.extract_lora.extraction import Extraction, extract

    extract(family, Extraction(**vars(args)))


if __name__ == "__main__":
    sys.exit(main())
