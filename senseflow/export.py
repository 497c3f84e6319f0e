"""Writes the student of a run's checkpoint as a diffusers component folder.

    python -m senseflow.export runs/flux --output student --dtype bfloat16

It needs one process and no GPU, and holds one tensor at a time in memory.
"""

import argparse
import dataclasses
import logging
import sys
from pathlib import Path

from senseflow.commands import Parser, exit_status
from senseflow.engine.build import export
from senseflow.engine.checkpoint import OpenCheckpoint, find_checkpoint
from senseflow.engine.config import Config, load_config
from senseflow.engine.export import Layout, write_component
from senseflow.engine.launch import quiet_libraries
from senseflow.trainer.recipes import RECIPES

logger = logging.getLogger("senseflow")

DESCRIPTION = """\
Write the student of a run's checkpoint as a diffusers component folder: config.json, safetensors
and senseflow.json, the card of how it is sampled. One process, no GPU, one tensor at a time in
memory. The folder appears whole or not at all.

Only read your own runs: a checkpoint's list of tensors is a Python pickle, which can run any code.
Of a stranger's run take student/step_*, which is safetensors.
"""
EXAMPLES = """examples:
  python -m senseflow.export runs/flux --output flux_student
  python -m senseflow.export runs/flux/checkpoints/step_0006000 --output flux_ema --ema --dtype float32
"""  # noqa: E501


def main(arguments: list[str] | None = None) -> int:
    """Parse, check, export; returns the exit status: 2 for wrong input, said in one line."""
    args = build_parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    quiet_libraries()
    return exit_status(lambda: run(args), "nothing was written")


def build_parser() -> Parser:
    """The flags."""
    parser = Parser(
        prog="python -m senseflow.export",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "checkpoint", type=Path, metavar="RUN_OR_CHECKPOINT",
        help="a run folder (its newest good checkpoint) or one of its checkpoints/step_*",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="must not be there yet"
    )
    parser.add_argument(
        "--ema", action="store_true", help="the average of the student's weights, not the last ones"
    )
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), help="(default: the run's precision.compute)"
    )
    parser.add_argument(
        "--pretrained_model", type=Path, metavar="DIR",
        help="the teacher's diffusers folder (default: the one in the run's config.yaml)",
    )  # fmt: skip
    return parser


def run(args: argparse.Namespace) -> None:
    """Raises ValueError for what cannot be exported, OSError for what cannot be written."""
    if args.output.exists():
        raise ValueError(f"--output {args.output} is there already: name another, or remove it")
    folder, iteration = find_checkpoint(args.checkpoint)
    config = read_config(folder.parent.parent, args.pretrained_model)
    stored = OpenCheckpoint(folder)
    keys = stored.student(args.ema)
    dtype = args.dtype or config.precision.compute
    student = export(config, RECIPES[config.recipe].family, dtype)
    check_keys(folder, stored, keys, student.layout)
    tensors = (stored.read(keys[key], student.layout.dtype) for key in student.layout.keys)
    describe = student.describe(iteration, config.ema.decay if args.ema else None)
    write_component(args.output, student.layout, tensors, describe)
    what = "EMA of the student" if args.ema else "student"
    logger.info("%s of iteration %d in %s, %s", what, iteration, args.output, dtype)


def read_config(run: Path, pretrained_model: Path | None) -> Config:
    """The configuration of a run, with its teacher where it is now."""
    config = load_config(run / "config.yaml")
    base = pretrained_model or Path(config.paths.pretrained_model)
    if not base.is_dir():
        raise ValueError(
            f"the run's teacher {base} is not there: name its folder with --pretrained_model"
        )
    paths = dataclasses.replace(config.paths, pretrained_model=str(base))
    return dataclasses.replace(config, paths=paths)


def check_keys(folder: Path, stored: OpenCheckpoint, keys: dict[str, str], layout: Layout) -> None:
    """Raise ValueError unless the checkpoint holds this teacher's student."""
    wanted = {key: like.shape for shapes in layout.files.values() for key, like in shapes.items()}
    other = [k for k in wanted if k not in keys or stored.shapes[keys[k]].size != wanted[k]]
    other += [k for k in keys if k not in wanted]
    if other:
        raise ValueError(
            f"{folder} is not a student of this teacher: {len(other)} keys differ, such as "
            f"{', '.join(other[:5])}"
        )


if __name__ == "__main__":
    sys.exit(main())
