"""`python -m senseflow.evaluate score`: flags, and checks that need no torch."""

import argparse
import textwrap
from pathlib import Path
from typing import Any

from senseflow.common.commands import Parser, number
from senseflow.common.fields import PixelsOrNone, SmallCount, Threads
from senseflow.common.tables import TEXT_COLUMNS
from senseflow.distill.scorers.metric import Flag, Given, Spec
from senseflow.evaluate.metrics import specs
from senseflow.sampling.prompts import FILES

KINDS: dict[str, tuple[Any, str]] = {  # of flags: their type and metavar
    "file": (Path, "FILE"),
    "folder": (Path, "DIR"),
    "pixels": (number(PixelsOrNone), "PIXELS"),
    "text": (str, "TEXT"),
}
DESCRIPTION = """\
Measure a folder of images and put the results into a JSON file. Weights are local files: nothing is
downloaded. A metric that the file already has for the same images, weights and settings is not
computed again. Under torchrun each process takes its share of the images.
"""
EPILOG = """example:
  %(prog)s --images runs/student --reference runs/teacher \\
      --name student --output results.json --metrics fid_t patch_fid_t clip \\
      --inception weights-inception-2015-12-05-6726825d.pth \\
      --clip_weights CLIP-ViT-g-14/open_clip_pytorch_model.safetensors
"""


PROMPTS_FORMS = (
    f"in place of sidecars ({FILES}): by a column file_name, or as "
    '{"file name": "prompt"}, else one per image in the order of their names'
)
IMAGES = Flag[Path](
    "--images", "folder", "images with the sidecars of our sampling, or any (with --prompts_file); "
    "several seeds lie in seed_0/, seed_1/, ...",
)  # fmt: skip
REFERENCE = Flag[Path]("--reference", "folder", "teacher's or real images, for distances")
PROMPTS = Flag[Path | None]("--prompts_file", "file", f"prompts of --images {PROMPTS_FORMS}")
REFERENCE_PROMPTS = Flag[Path | None](
    "--reference_prompts_file", "file", f"prompts of --reference {PROMPTS_FORMS}"
)
COLUMN = Flag[str | None](
    "--prompts_column", "text",
    f"of these tables' prompts (the first of {', '.join(TEXT_COLUMNS)})",
)  # fmt: skip
OWN: tuple[Flag[Any], ...] = (IMAGES, REFERENCE, PROMPTS, REFERENCE_PROMPTS, COLUMN)


def add_arguments(parser: Parser) -> None:
    """The flags of `score`: its own, then each metric's."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    group = parser.add_argument_group("what")
    for flag in OWN:
        _add(group, flag, required=flag is IMAGES)
    names = [spec.name for spec in specs.METRICS]
    group.add_argument("--metrics", nargs="+", required=True, choices=names, metavar="METRIC",
                       help=", ".join(names))  # fmt: skip
    group.add_argument("--name", required=True, help="of the row, such as 'FLUX, 4 steps'")
    group.add_argument("--output", type=Path, default=Path("results.json"), metavar="JSON")
    group.add_argument("--mixed_sizes", action="store_true", help="images may differ in size")
    group.add_argument("--again", action="store_true", help="compute what is there already too")
    _add_machine_flags(parser)
    _add_metric_flags(parser)


def _add(group: argparse._ArgumentGroup, flag: Flag[Any], required: bool = False) -> None:
    read, metavar = KINDS[flag.kind]
    group.add_argument(
        flag.name, dest=flag.name, type=read, default=flag.default, help=flag.help,
        choices=flag.choices, metavar=None if flag.choices else metavar, required=required,
    )  # fmt: skip


def _add_machine_flags(parser: Parser) -> None:
    whole = ", ".join(spec.name for spec in specs.METRICS if spec.float32)
    group = parser.add_argument_group("machine")
    group.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    group.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32",
        help=f"of the models, but for {whole}, which are float32 (float32)",
    )  # fmt: skip
    group.add_argument("--batch_size", type=number(SmallCount), default=32)
    group.add_argument(
        "--threads", type=number(Threads), default=4, help="that decode images, per process (4)"
    )


def _add_metric_flags(parser: Parser) -> None:
    """A group for each metric: what it is, and those of its flags that no metric above has."""
    listed: set[Flag[Any]] = set()
    for spec in specs.METRICS:
        shared = ", ".join(flag.name for flag in spec.flags if flag in listed)
        about = spec.about + (f"; takes {shared} too" if shared else "")
        group = parser.add_argument_group(spec.name, textwrap.fill(about, 90))
        for flag in spec.flags:
            if flag not in listed:
                listed.add(flag)
                _add(group, flag)


def check_flags(metrics: list[Spec], given: Given) -> None:
    """Raise ValueError for a path or size that is wrong, and for what the metrics lack."""
    for flag in dict.fromkeys([*OWN, *(flag for spec in specs.METRICS for flag in spec.flags)]):
        flag.check(given[flag])
    if given[COLUMN] and not (given[PROMPTS] or given[REFERENCE_PROMPTS]):
        raise ValueError(f"{COLUMN.name} is of a table: name its {PROMPTS.name}")
    for spec in metrics:
        lacking = [flag for flag in spec.flags if flag.required and given[flag] is None]
        if lacking:
            said = " and ".join(f"{flag.name} ({flag.help})" for flag in lacking)
            raise ValueError(f"{spec.name} needs {said}")
        if spec.needs == "reference" and given[REFERENCE] is None:
            raise ValueError(f"{spec.name} needs --reference: the folder of the teacher's images")
