"""Draws the picture of docs/distil_your_own.md: strips and curves of runs side by side.

python docs/collapse.py runs/own/student runs/own/collapse --output docs/images/distil_collapse.png
"""

import argparse
import io
import sys
from itertools import zip_longest
from pathlib import Path
from typing import Annotated

from matplotlib.figure import Figure
from PIL import Image

from senseflow.common.commands import Parser, exit_status, number
from senseflow.common.fields import Bounds
from senseflow.common.pictures import save_whole
from senseflow.report.run_folder import read_run
from senseflow.report.signals import Curves, curves_of

CURVES = ("loss/fake", "ida/gap", "drift/mean", "drift/contrast")
COLOURS = ("#1f6fb2", "#c8402f", "#3b8f5a", "#8a4fa3")


def main(arguments: list[str] | None = None) -> int:
    """Parse, draw; returns the exit status: 2 for wrong input, said in one line."""
    parser = Parser(prog="python docs/collapse.py", description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN_DIR")
    parser.add_argument("--output", type=Path, required=True, metavar="PNG")
    parser.add_argument(
        "--strips",
        type=number(Annotated[int, Bounds(2, 64)]),
        default=4,
        help="of each run, at least 2 (4)",
    )
    args = parser.parse_args(arguments)
    return exit_status(lambda: run(args), "nothing was written")


def run(args: argparse.Namespace) -> None:
    """One line of strips per run, and one of curves below; raises ValueError for no run."""
    figure = Figure(figsize=(3 * args.strips, 3.1 * len(args.runs) + 2.6), dpi=75)
    lines = figure.subfigures(len(args.runs) + 1, 1, height_ratios=[3.1] * len(args.runs) + [2.6])
    for part, folder in zip(lines, args.runs, strict=False):
        _strips(part, folder, args.strips)
    curves = {folder.name: curves_of(read_run(folder).rows) for folder in args.runs}
    _curves(lines[-1], curves)
    with io.BytesIO() as stream:
        figure.savefig(stream, format="png")
        picture = Image.open(stream).convert("P", palette=Image.Palette.ADAPTIVE, colors=128)
    save_whole(picture, args.output)


def _strips(part: Figure, folder: Path, num: int) -> None:
    """The column of generated images of strips from the first to the last."""
    files = sorted((folder / "samples").glob("step_*.png"))
    if not files:
        raise ValueError(f"{folder} has no strips: log.sample_interval says when they are drawn")
    last, steps = len(files) - 1, max(1, min(num, len(files)) - 1)
    chosen = [files[last * i // steps] for i in range(min(num, len(files)))]
    part.suptitle(folder.name, x=0.01, ha="left", fontsize=12)
    for axes, file in zip_longest(part.subplots(1, num), chosen):
        axes.axis("off")
        if file is None:
            continue
        with Image.open(file) as strip:
            axes.imshow(strip.convert("RGB").crop((0, 0, 3 * 96, strip.height)))
        axes.set_title(f"iteration {int(file.stem.removeprefix('step_'))}", fontsize=10)


def _curves(part: Figure, runs: dict[str, Curves]) -> None:
    """The signals of collapse, all runs on one scale."""
    for axes, name in zip(part.subplots(1, len(CURVES)), CURVES, strict=True):
        for colour, (run_name, curves) in zip(COLOURS, runs.items(), strict=False):
            if name in curves:
                curve = curves[name].finite
                axes.plot(curve.iterations, curve.values, color=colour, label=run_name)
        axes.set_yscale("log" if name == "loss/fake" else "linear")
        axes.set_title(name, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    part.axes[0].legend(frameon=False, fontsize=8)
    part.subplots_adjust(bottom=0.2, top=0.85, left=0.05, right=0.98, wspace=0.3)


if __name__ == "__main__":
    sys.exit(main())
