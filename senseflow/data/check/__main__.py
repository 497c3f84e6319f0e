"""Checks a data set before a run: what is unreadable, small, cut away, equal, or cut short.

Open every image of a data set as training does and say what a run would meet: files that cannot be
read or are cut short, pictures smaller than the resolution, what the crop takes away, equal and
nearly equal pictures; and of the captions empty and repeated ones, and those that are longer than
the teacher's tokenizers read. DATASET is a JSON with keys, image_paths, prompts; the folder of an
LMDB of latents, of which rows, numbers and captions are checked; or a list of prompts.

Exit status: 0 when nothing would stop the run, 1 when something would, 2 for wrong input.

Results: check.json, numbers.png, suspicious.png, in a folder beside the data set.
"""

import argparse
import logging
import os
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
from senseflow.common.fields import Pixels, Threads
from senseflow.common.files import require_writable
from senseflow.common.tables import has_prompts_alone
from senseflow.data.image_files import CHECKED

EXAMPLES = """examples:
  python -m senseflow.data.check data.json configs/FLUX/flux_senseflow.yaml \\
      paths.pretrained_model=/path/to/FLUX.1-dev
  python -m senseflow.data.check data.json --resolution 1024 --teacher /path/to/FLUX.1-dev
  python -m senseflow.data.check data/lmdb --config configs/sdxl/sdxl_senseflow.yaml
"""


def main(arguments: list[str] | None = None) -> int:
    """Parse, check, write; returns the exit status."""
    args = build_parser().parse_intermixed_args(arguments)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("senseflow").setLevel(logging.INFO)

    def work() -> int:
        check(args)
        # matplotlib; with a teacher transformers
        from senseflow.data.check.command import read_setting, run

        setting = read_setting(args.config, args.overrides, args.resolution, args.teacher)
        return int(run(args.dataset, setting, args.output, args.workers))

    return exit_status(work, "nothing was written")


def build_parser() -> Parser:
    """The flags."""
    parser = module_parser("senseflow.data.check", __doc__, EXAMPLES)
    parser.add_argument(
        "dataset", type=Path, metavar="DATASET", help="JSON, folder of an LMDB, or prompts"
    )
    add_config(
        parser, "YAML of the run: its resolution, crop, teacher, T5 length and max_unreadable"
    )
    parser.add_argument(
        "--resolution", type=number(Pixels), nargs="+", metavar="PIXELS",
        help="one side, or height and width (the config's)",
    )  # fmt: skip
    parser.add_argument(
        "--teacher", type=Path, metavar="DIR",
        help="diffusers folder, for its tokenizers (the config's, if it is there)",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="(default: NAME_OF_DATASET.check beside it)"
    )
    parser.add_argument(
        "--workers", type=number(Threads), metavar="N",
        help="processes that open images (as many as this one may use cores)",
    )  # fmt: skip
    return parser


def check(args: argparse.Namespace) -> None:
    """What needs no image opened, and defaults; raises ValueError."""
    take_config(args, required=False)
    if not args.dataset.exists():
        raise ValueError(f"data set {args.dataset} does not exist")
    if args.dataset.is_dir() and not (args.dataset / "data.mdb").exists():
        raise ValueError(
            f"data set {args.dataset} is not an LMDB, it has no data.mdb: name a JSON file; of a "
            "folder of images python -m senseflow.data.make makes one"
        )
    images = args.dataset.is_file() and not has_prompts_alone(args.dataset)
    if args.config is None and args.resolution is None and images:
        raise ValueError("--config or --resolution: say at which size the images will be used")
    if args.config is None and args.overrides:
        raise ValueError(f"{args.overrides[0]}: overrides are of a --config")
    if len(args.resolution or []) > 2:
        raise ValueError(f"--resolution {args.resolution}: one side, or height and width")
    if args.teacher and not (args.teacher / "model_index.json").is_file():
        raise ValueError(f"--teacher {args.teacher} is no diffusers folder: no model_index.json")
    args.output = args.output or beside(args.dataset)
    require_writable("--output", args.output)
    if args.workers is None:
        args.workers = len(os.sched_getaffinity(0))


def beside(dataset: Path) -> Path:
    """The folder of what is found, where a data set of the same name elsewhere has another."""
    place = dataset if dataset.name else dataset.absolute()
    return place.with_name(f"{place.stem if place.is_file() else place.name}{CHECKED}")


if __name__ == "__main__":
    sys.exit(main())
