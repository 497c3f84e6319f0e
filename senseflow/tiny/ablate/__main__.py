"""The paper's ablation on the embedded teachers: which part does what, measured over seeds.

Trains every cell of a study (configs/ablation.yaml, or your own) with several seeds, measures the
students, and writes tables, curves and pictures: OUTPUT/report.md, results.json and PNG files. A
trial that is done is kept; stopped in any way, the same command goes on where it was.
"""

import argparse
import logging
import os
import sys
from pathlib import Path

from senseflow.common.commands import Parser, exit_status, module_parser, number
from senseflow.common.fields import Threads

STUDY = Path("configs/ablation.yaml")
EXAMPLES = """examples:
  python -m senseflow.tiny.ablate --output runs/ablation
  python -m senseflow.tiny.ablate --quick --output /tmp/quick
  python -m senseflow.tiny.ablate --study my_idea.yaml --tables parts --output runs/my_idea
"""


def main(arguments: list[str] | None = None) -> int:
    """Parse, run, report; returns the exit status: 2 for wrong input, said in one line."""
    args = build_parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return exit_status(lambda: run(args), "what is done is kept, the same command goes on")


def build_parser() -> Parser:
    """The flags."""
    parser = module_parser("senseflow.tiny.ablate", __doc__, EXAMPLES)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--study", type=Path, default=STUDY, metavar="YAML", help=f"({STUDY})")
    parser.add_argument(
        "--tables", nargs="+", metavar="NAME", help="of the study's tables, these alone"
    )
    parser.add_argument(
        "--workers", type=number(Threads), default=os.cpu_count() or 1,
        help="trials at a time, a thread each (default: one per core)",
    )  # fmt: skip
    parser.add_argument(
        "--quick", action="store_true",
        help="one teacher, two seeds, a few iterations: says nothing but that it runs",
    )  # fmt: skip
    parser.add_argument("--report", action="store_true", help="train nothing, report what is there")
    return parser


def run(args: argparse.Namespace) -> None:
    """Raises ValueError for a study that cannot be run."""
    from senseflow.tiny.ablate.run import Ablation  # torch and diffusers, seconds

    ablation = Ablation.open(args.study, args.output, args.quick, args.tables)
    if not args.report:
        ablation.run(args.workers)
    ablation.report()


if __name__ == "__main__":
    sys.exit(main())
