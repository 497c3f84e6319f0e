"""What a trainer module runs: from a command line to the processes of a run.

`main` is what `sh exp_*/train_*.sh NODES GPUS CONFIG SAVE_DIR [key.sub=value ...]` calls. It
answers a wrong command or configuration at once: torch takes a second to import, diffusers and
transformers take several, so they come after that, once for all processes of this node, which are
forks of this one. Under torchrun alone, `-m senseflow.trainer.trainer_X --worker CONFIG SAVE_DIR
[key.sub=value ...]` is one process of the run.
"""

import argparse
import logging
import os
import sys
import time
from functools import partial
from pathlib import Path

from senseflow.common.commands import Parser, number, words_of
from senseflow.common.environment import own_position
from senseflow.common.fields import CountOrNone, SmallCount, Threads
from senseflow.common.files import require_folder
from senseflow.common.quiet import set_up_notes
from senseflow.common.signals import STARTED, Forwarder
from senseflow.config.config import Config, load_config
from senseflow.config.load import check_split, load_recipe
from senseflow.config.recipes import RECIPES, Recipe
from senseflow.engine.checkpoint_folders import (
    complete_checkpoints,
    require_known_layout,
    require_run_base,
)
from senseflow.engine.hold import require_free


def main(recipe: Recipe) -> None:
    """Entry point of a trainer module: the launcher, or with --worker one process of the run."""
    if "--worker" in sys.argv:
        words = [a for a in sys.argv[1:] if a != "--worker"]
        if len(words) < 2:
            sys.exit("error: --worker needs CONFIG SAVE_DIR [key.sub=value ...]")
        try:
            own_position()
        except ValueError as error:
            sys.exit(f"error: {error}")
        work(recipe, Path(words[0]), Path(words[1]), words[2:])
        return
    # First of all: train.time_limit counts the imports too, as the queue's own clock does.
    os.environ[STARTED] = str(time.monotonic())
    # Before the imports, which take seconds: a signal meanwhile must not be lost.
    stop = Forwarder()
    stop.start()
    set_up_notes(logging.INFO)
    args = read_arguments(recipe)
    settle_environment(args.gpus)
    try:
        config = check_arguments(args, recipe)
        from senseflow.launch.launch import launch  # torch, a second

        worker = partial(work, recipe, args.config, args.save_dir, args.overrides)
        code = launch(worker, config, recipe.family, args.nodes, args.gpus, args.max_restarts, stop)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {words_of(error)}")
    sys.exit(code)


def work(recipe: Recipe, config: Path, folder: Path, overrides: list[str]) -> None:
    """One process of the run, to its end."""
    from senseflow.launch.worker import run_worker  # diffusers, seconds

    run_worker(recipe, config, folder, overrides)


def settle_environment(processes: int) -> None:
    """What torch reads when it is imported, where the user has not said it: the threads of a
    process, and an allocator that grows what it has in place of keeping pieces that fit nothing."""
    threads = max(1, len(os.sched_getaffinity(0)) // max(1, processes))
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    if "PYTORCH_ALLOC_CONF" not in os.environ:  # its newer name
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def read_arguments(recipe: Recipe) -> argparse.Namespace:
    """The command line of the shell script; options may stand anywhere."""
    parser = Parser(
        prog=os.environ.get("SENSEFLOW_SCRIPT", f"sh {recipe.script}"),
        description="Distil a teacher. Run again with the same SAVE_DIR, it goes on from the last "
        "complete checkpoint. Several nodes: the same command on each, with NODE_RANK, MASTER_ADDR "
        "and MASTER_PORT set, or torchrun's PET_RDZV_ENDPOINT. SIGTERM, SIGINT or SIGUSR1, to any "
        "process of it, saves a checkpoint and stops.",
        epilog=f"example: sh {recipe.script} 1 8 {recipe.config} runs/{recipe.name} train.seed=1",
    )
    first = (
        ": NODES and GPUS, the processes per node, come first, as in "
        f"sh {recipe.script} 1 8 {recipe.config} runs/{recipe.name}"
    )
    parser.add_argument(
        "nodes", type=number(SmallCount, first), metavar="NODES", help="number of nodes"
    )
    parser.add_argument(
        "gpus", type=number(Threads, first), metavar="GPUS", help="processes per node"
    )
    parser.add_argument("config", type=Path, metavar="CONFIG", help="YAML file of the recipe")
    parser.add_argument("save_dir", type=Path, metavar="SAVE_DIR", help="run folder")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="config overrides")
    parser.add_argument(
        "--max-restarts",
        type=number(CountOrNone),
        default=0,
        metavar="N",
        help="after a failure that need not repeat, start again from the last complete checkpoint, "
        "at most N times (0)",
    )
    return parser.parse_intermixed_args()


def require_own_family(run: Path, recipe: Recipe) -> None:
    """Raise ValueError for a run folder whose checkpoints hold another family's networks."""
    file = run / "config.yaml"
    if not file.is_file() or not complete_checkpoints(run / "checkpoints"):
        return
    try:
        held = RECIPES[load_config(file).recipe]
    except ValueError:
        return  # the run says that it is not compared, and the networks are
    if held.family is not recipe.family:
        raise ValueError(
            f"SAVE_DIR {run} is a run of {held.name}, whose networks {recipe.name} does not have: "
            "name another SAVE_DIR"
        )


def check_arguments(args: argparse.Namespace, recipe: Recipe) -> Config:
    """The configuration, and all that can be said without torch; raises ValueError or OSError."""
    require_folder("SAVE_DIR", args.save_dir)
    require_free(args.save_dir)
    require_known_layout(args.save_dir)
    require_own_family(args.save_dir, recipe)
    config = load_recipe(recipe, args.config, args.overrides)
    require_run_base(args.save_dir, config)
    check_split(config, args.nodes * args.gpus)
    return config
