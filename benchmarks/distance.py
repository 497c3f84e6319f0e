"""How far runs end from a first one, over how far that one moved: what a setting changes.

    python -m benchmarks.distance RUN OTHER [OTHER ...]

The students of the newest checkpoints of run folders, in double precision:
||theta_other - theta_run|| / ||theta_run - theta_0||, theta_0 being the teacher's weights. Two runs
that differ in the seed alone say what a change of no importance looks like.
"""

import argparse
import sys
from pathlib import Path

import torch

from senseflow.common.commands import exit_status
from senseflow.config.config import Config, load_config
from senseflow.config.recipes import RECIPES
from senseflow.config.teacher import teacher_settings
from senseflow.engine.checkpoint_folders import find_checkpoint
from senseflow.engine.checkpoint_reader import OpenCheckpoint


def start(config: Config) -> dict[str, torch.Tensor]:
    """The student's parameters as a run of this configuration begins with them."""
    source = RECIPES[config.recipe].family.student(teacher_settings(config))
    return {key: source.read(key)[...].double() for key, _ in source.network.named_parameters()}


def student(run: Path, keys: list[str]) -> dict[str, torch.Tensor]:
    """The same at its newest checkpoint."""
    stored = OpenCheckpoint(find_checkpoint(run)[0])
    kept = stored.student(ema=False)
    return {key: stored.read(kept[key], torch.float64) for key in keys}


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """||one - other|| over all parameters."""
    return float(sum((one[key] - other[key]).square().sum() for key in one) ** 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="the run folder that the others are compared with")
    parser.add_argument("others", type=Path, nargs="+", metavar="OTHER")
    args = parser.parse_args()
    sys.exit(exit_status(lambda: compare(args.run, args.others), "nothing was written"))


def compare(run: Path, others: list[Path]) -> None:
    """Print a row for every other run."""
    begun = start(load_config(run / "config.yaml"))
    first = student(run, list(begun))
    moved = distance(first, begun)
    print("| run | apart over moved |\n|---|---|")
    for other in others:
        print(f"| {other.name} | {distance(student(other, list(begun)), first) / moved:.3f} |")


if __name__ == "__main__":
    main()
