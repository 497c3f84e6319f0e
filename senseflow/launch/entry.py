"""What a trainer module runs; it answers a wrong command or configuration at once.

The libraries of the networks take seconds to import, so they come after that. `main` is what
`sh exp_*/train_*.sh NODES GPUS CONFIG SAVE_DIR [key.sub=value ...]` calls, and what each process
runs, also under `torchrun -m senseflow.trainer.trainer_X --worker CONFIG SAVE_DIR
[key.sub=value ...]` alone.
"""

import argparse
import logging
import os
import sys
import time
from pathlib import Path

from senseflow.common.quiet import set_up_notes
from senseflow.common.signals import STARTED, Forwarder
from senseflow.config.config import Config
from senseflow.config.load import check_split, load_recipe
from senseflow.config.recipes import Recipe
from senseflow.engine.checkpoint_folders import require_known_layout


def main(module: str, recipe: Recipe) -> None:
    """Entry point of a trainer module: the launcher, or with --worker one process of the run."""
    if "--worker" in sys.argv:
        from senseflow.launch.worker import run_worker  # diffusers, seconds

        run_worker(recipe)
        return
    os.environ[STARTED] = str(time.monotonic())
    stop = Forwarder()
    stop.start()
    set_up_notes(logging.INFO)
    args = read_arguments(module, recipe)
    try:
        config = check_arguments(args, recipe)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    from senseflow.launch.launch import launch  # diffusers, seconds

    launch(module, recipe, args, config, stop)


def read_arguments(module: str, recipe: Recipe) -> argparse.Namespace:
    """The command line of the shell script; options may stand anywhere."""
    parser = argparse.ArgumentParser(
        prog=os.environ.get("SENSEFLOW_SCRIPT", module),
        description="Distil a teacher. Run again with the same SAVE_DIR, it goes on from the last "
        "complete checkpoint. Several nodes: the same command on each, with NODE_RANK, MASTER_ADDR "
        "and MASTER_PORT set, or torchrun's PET_RDZV_ENDPOINT. SIGTERM, SIGINT or SIGUSR1, to any "
        "process of it, saves a checkpoint and stops.",
        epilog=f"example: sh {recipe.script} 1 8 {recipe.config} runs/{recipe.name} train.seed=1",
    )
    parser.add_argument("nodes", type=int, metavar="NODES", help="number of nodes")
    parser.add_argument("gpus", type=int, metavar="GPUS", help="processes per node")
    parser.add_argument("config", metavar="CONFIG", help="YAML file of the recipe")
    parser.add_argument("save_dir", metavar="SAVE_DIR", help="run folder")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="config overrides")
    parser.add_argument(
        "--max-restarts",
        type=int,
        default=0,
        metavar="N",
        help="after a failure that need not repeat, start again from the last complete checkpoint, "
        "at most N times (0)",
    )
    return parser.parse_intermixed_args()


def check_arguments(args: argparse.Namespace, recipe: Recipe) -> Config:
    """The configuration, and all that can be said without the networks' libraries.

    Raises ValueError or OSError.
    """
    if args.nodes < 1 or args.gpus < 1:
        raise ValueError(f"NODES {args.nodes} and GPUS {args.gpus} must be at least 1")
    if args.max_restarts < 0:
        raise ValueError(f"--max-restarts {args.max_restarts} must not be negative")
    if Path(args.save_dir).exists() and not Path(args.save_dir).is_dir():
        raise ValueError(f"SAVE_DIR {args.save_dir} is a file")
    require_known_layout(Path(args.save_dir))
    config = load_recipe(recipe, Path(args.config), args.overrides)
    check_split(config, args.nodes * args.gpus)
    return config
