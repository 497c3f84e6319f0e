"""Writes the student of a run or checkpoint as others can use it, with its model card.

Write the student of a run or checkpoint as a folder that appears whole or not at all, with a model
card (README.md) and senseflow.json, which says how it is sampled. One process, no GPU, one tensor
at a time in memory. The forms:

  component  the network alone, as diffusers saves it: config.json, safetensors (LoRA runs: LoRA)
  pipeline   a whole pipeline: the teacher's other parts beside the student, and the scheduler by
             which plain diffusers samples it at its anchors (LoRA runs: fused)
  comfyui    one safetensors, of any size, for ComfyUI's Load Diffusion Model (LoRA runs: fused)
  original   the same in the names of the teacher's authors, which GGUF converters,
             stable-diffusion.cpp, older ComfyUI and, of FLUX, InvokeAI read (LoRA runs: fused)
  lora       pytorch_lora_weights.safetensors (LoRA runs; of others: senseflow.extract_lora)

docs/export.md has the call of each form.
"""

import argparse
import logging
import sys
from pathlib import Path

from senseflow.common.commands import Parser, exit_status, module_parser, number
from senseflow.common.files import require_writable
from senseflow.common.hub_names import said_missing
from senseflow.sampling.cli import Steps

STOPPED = "--output is whole or not there"
SENDING = ("output", "push_to_hub", "dry_run", "public")  # flags of a folder that is there
FORMS = ("component", "pipeline", "comfyui", "original", "lora")

EXAMPLES = """examples:
  python -m senseflow.export runs/flux --output flux_student
  python -m senseflow.export runs/flux --form pipeline --output flux_4_steps --dtype bfloat16
  python -m senseflow.export runs/flux_8 --form pipeline --steps 4 --output flux_4_steps
  python -m senseflow.export runs/flux/checkpoints/step_0006000 --output flux_ema --ema --dtype float32
  python -m senseflow.export runs/flux --form pipeline --output flux_4_steps \\
      --push_to_hub me/flux_4_steps --dry_run
"""  # noqa: E501


def main(arguments: list[str] | None = None) -> int:
    """Parse, check, export; returns the exit status: 2 for wrong input, said in one line."""
    args = build_parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return exit_status(lambda: run(args), STOPPED)


def build_parser() -> Parser:
    """The flags."""
    parser = module_parser("senseflow.export", __doc__, EXAMPLES)
    parser.add_argument(
        "checkpoint", type=Path, nargs="?", metavar="RUN_OR_CHECKPOINT",
        help="a run folder (its newest good checkpoint), one of its checkpoints/step_*, or a "
        "folder with weights and senseflow.json, such as student/step_*; with --push_to_hub it may "
        "be left out: an --output that is there is sent",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="must not be there yet"
    )
    parser.add_argument("--form", choices=FORMS, default="component", help="(component)")
    parser.add_argument(
        "--ema", action="store_true", help="the average of the student's weights, not the last ones"
    )
    parser.add_argument(
        "--steps", type=number(Steps), metavar="N",
        help="a divisor of the number of its anchors: the folder draws in so many (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"),
        help="(default: the run's precision.compute, a folder's own)",
    )  # fmt: skip
    parser.add_argument(
        "--pretrained_model", type=Path, metavar="DIR",
        help="the teacher's diffusers folder (default: the one in the run's config.yaml)",
    )  # fmt: skip
    parser.add_argument(
        "--link", action="store_true",
        help="with --form pipeline: links to the teacher's files, not copies; for this machine",
    )  # fmt: skip
    _add_card_flags(parser)
    _add_hub_flags(parser)
    return parser


def _add_card_flags(parser: Parser) -> None:
    group = parser.add_argument_group("model card")
    group.add_argument("--name", metavar="TEXT", help="its title (default: the folder's name)")
    group.add_argument(
        "--prompt", metavar="TEXT", default="a red fox in the snow",
        help="what the script on the card draws (%(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--base_model", metavar="ID",
        help="the teacher on the Hub (default: the public one of its family)",
    )  # fmt: skip
    group.add_argument(
        "--license", metavar="ID",
        help="the teacher's licence in the Hub's words (default: that of the public one)",
    )  # fmt: skip
    group.add_argument("--license_name", metavar="NAME", help="with --license other")
    group.add_argument("--license_link", metavar="URL", help="with --license other: its text")
    group.add_argument(
        "--results", type=Path, nargs="+", default=[], metavar="FILE",
        help="results of python -m senseflow.evaluate score",
    )  # fmt: skip
    group.add_argument("--row", metavar="NAME", help="the student's row of the results")
    group.add_argument(
        "--samples", type=Path, nargs="+", default=[], metavar="FILE",
        help="pictures to show; those of the sampling scripts bring their prompts and seeds",
    )  # fmt: skip


def _add_hub_flags(parser: Parser) -> None:
    group = parser.add_argument_group("Hugging Face Hub (nothing is sent unless asked for)")
    group.add_argument(
        "--push_to_hub", metavar="OWNER/NAME", help="send the folder to this repository"
    )
    group.add_argument(
        "--dry_run", action="store_true", help="write the folder, list what would go, send nothing"
    )
    group.add_argument("--public", action="store_true", help="the repository (default: private)")


def run(args: argparse.Namespace) -> None:
    """Raises ValueError for what cannot be exported, OSError for what cannot be written or sent."""
    check(args)
    from senseflow.export.ship import Export, ship  # torch and diffusers, seconds

    ship(Export(**vars(args)))


def check(args: argparse.Namespace) -> None:
    """What needs no torch; raises ValueError."""
    if args.checkpoint is None and not args.push_to_hub:
        raise ValueError("RUN_OR_CHECKPOINT is missing: what is to be exported")
    if args.checkpoint is not None and args.output.exists():
        raise ValueError(f"--output {args.output} is there already: name another, or remove it")
    if args.checkpoint is not None and not args.checkpoint.exists():
        raise ValueError(
            f"the run folder or checkpoint {args.checkpoint} {said_missing(args.checkpoint)}"
        )
    if args.checkpoint is not None:
        require_writable("--output", args.output.parent)
    if args.checkpoint is None:
        defaults = build_parser().parse_args(["--output", "."])
        for name, value in vars(args).items():
            if name not in SENDING and value != getattr(defaults, name):
                raise ValueError(
                    f"--{name} is of a folder that is written, and {args.output} is sent as it is: "
                    "name a run or checkpoint to export"
                )
    if args.checkpoint is None and not args.output.is_dir():
        raise ValueError(f"--output {args.output} is not there: name a run or checkpoint to export")
    if (args.dry_run or args.public) and not args.push_to_hub:
        raise ValueError("--dry_run and --public are for --push_to_hub OWNER/NAME")
    if args.link and args.form != "pipeline":
        raise ValueError(f"--link is for --form pipeline: {args.form} has no file of the teacher's")
    if args.name is not None and not args.name.strip():
        raise ValueError("--name is empty")
    for flag, files in (("--results", args.results), ("--samples", args.samples)):
        for file in files:
            if not file.is_file():
                raise ValueError(f"{flag} {file} is not a file")


if __name__ == "__main__":
    sys.exit(main())
