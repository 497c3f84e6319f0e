"""Write one HTML page of a run folder: its state, the curves of stats.jsonl with warning signals,
image strips through time, samples of teacher and students side by side, results, and the
configuration with its differences from the published one. The page needs no network and no script,
and appears whole or not at all. Strips are embedded at 1400 pixels at most and samples at 512.

It needs no GPU and no torch, and reads a run that is still training as well as one that was
killed.
"""

import argparse
import logging
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from senseflow.common.commands import Parser, exit_status, module_parser, number
from senseflow.common.fields import Count

if TYPE_CHECKING:
    from senseflow.report.pairs import Pairs

logger = logging.getLogger("senseflow")

NUM_STRIPS = 12
NUM_SAMPLES = 24
EXAMPLES = """examples:
  python -m senseflow.report runs/flux
  python -m senseflow.report runs/flux --output flux.html --results results.json \\
      --teacher_images outputs/teacher --student_images outputs/4_steps outputs/2_steps
"""


def main(arguments: list[str] | None = None) -> int:
    """Parse, check, write; returns the exit status: 2 for wrong input, said in one line."""
    args = build_parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return exit_status(lambda: run(args), "nothing was written")


def build_parser() -> Parser:
    """The flags."""
    parser = module_parser("senseflow.report", __doc__, EXAMPLES)
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="the SAVE_DIR of a training")
    parser.add_argument(
        "--output", type=Path, metavar="HTML", help="(default: report.html in the run folder)"
    )
    parser.add_argument(
        "--teacher_images", type=Path, metavar="DIR",
        help="--output_dir of a sampling script, or a folder that `evaluate generate` filled",
    )  # fmt: skip
    parser.add_argument(
        "--student_images", type=Path, nargs="+", action="extend", default=[], metavar="DIR",
        help="the same, of the student; any number, such as 4, 2 and 1 steps",
    )  # fmt: skip
    parser.add_argument(
        "--results", type=Path, metavar="JSON",
        help="what `senseflow.evaluate score` or `table` wrote",
    )  # fmt: skip
    parser.add_argument(
        "--num_strips",
        type=number(Count),
        default=NUM_STRIPS,
        help=f"at most this many ({NUM_STRIPS})",
    )
    parser.add_argument(
        "--num_samples",
        type=number(Count),
        default=NUM_SAMPLES,
        help=f"prompts at most ({NUM_SAMPLES})",
    )
    return parser


def run(args: argparse.Namespace) -> None:
    """Raises ValueError for what cannot be read, OSError for what cannot be written."""
    # what follows is imported here so that --help is answered at once
    from senseflow.common.files import write_whole
    from senseflow.evaluate.results import read_results
    from senseflow.report.page import Report, page
    from senseflow.report.pictures import collect
    from senseflow.report.run_folder import read_run
    from senseflow.report.settings import compare

    folder = read_run(args.run)
    output = args.output or args.run / "report.html"
    if output.is_dir():
        raise ValueError(
            f"--output {output} is a folder: name a file, such as {output}/report.html"
        )
    results = read_results(args.results) if args.results else []
    pictures = collect(folder, read_pairs(args), args.num_strips, args.num_samples)
    for said in [*folder.notices, *pictures.notices, *pictures.missing]:
        logger.warning("%s", said)
    text = page(Report(folder, compare(folder.config), pictures, results, time.time()))
    output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(output, text)
    kib = len(text.encode()) / 2**10
    logger.info("%s, %s", output, f"{kib / 1024:.1f} MiB" if kib >= 1024 else f"{kib:.0f} KiB")


def read_pairs(args: argparse.Namespace) -> "Pairs | None":
    """The images of --teacher_images and --student_images by prompt and seed; None without."""
    from senseflow.report.pairs import match, read_samples

    named = [("--teacher_images", args.teacher_images)] if args.teacher_images else []
    named += [("--student_images", folder) for folder in args.student_images]
    if not named:
        return None
    notices: list[str] = []
    return match([read_samples(folder, flag, notices) for flag, folder in named], notices)


if __name__ == "__main__":
    sys.exit(main())
