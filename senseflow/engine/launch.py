"""From the shell scripts to running processes: check the input, then start torchrun's agent.

`launch` is what `sh exp_*/train_*.sh NODES GPUS CONFIG SAVE_DIR [key.sub=value ...]` calls; `main`
is what each process runs.
"""

import argparse
import logging
import os
import signal
import sys
import warnings
from pathlib import Path
from types import FrameType

import diffusers
import psutil
import torch
import transformers
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from senseflow.data.items import UnreadableImagesError
from senseflow.engine.build import check, prepare
from senseflow.engine.config import Config
from senseflow.engine.loop import NonFiniteError
from senseflow.engine.recipe import SCRIPTS, Recipe


def launch(module: str, recipe: Recipe) -> None:
    """Start GPUS processes of `module` on this node; errors of the input end it at once."""
    parser = argparse.ArgumentParser(
        prog=os.environ.get("SENSEFLOW_SCRIPT", module),
        description="Distil a teacher. Run again with the same SAVE_DIR, it goes on from the last "
        "complete checkpoint. Several nodes: the same command on each, with NODE_RANK, MASTER_ADDR "
        "and MASTER_PORT set.",
        epilog=f"example: sh {SCRIPTS[recipe.name]} 1 8 {recipe.config} runs/{recipe.name} "
        "train.seed=1",
    )
    parser.add_argument("nodes", type=int, metavar="NODES", help="number of nodes")
    parser.add_argument("gpus", type=int, metavar="GPUS", help="processes per node")
    parser.add_argument("config", metavar="CONFIG", help="YAML file of the recipe")
    parser.add_argument("save_dir", metavar="SAVE_DIR", help="run folder")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="config overrides")
    args = parser.parse_args()
    try:
        if args.nodes < 1 or args.gpus < 1:
            raise ValueError(f"NODES {args.nodes} and GPUS {args.gpus} must be at least 1")
        if Path(args.save_dir).exists() and not Path(args.save_dir).is_dir():
            raise ValueError(f"SAVE_DIR {args.save_dir} is a file")
        config = recipe.load(Path(args.config), args.overrides)
        check(config, recipe.family)
        check_split(config, args.nodes * args.gpus)
        check_devices(args.gpus, torch.cuda.device_count())
        where = rendezvous(args.nodes)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    threads = max(1, (os.cpu_count() or 1) // args.gpus)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    worker = ["-m", module, "--worker", args.config, args.save_dir, *args.overrides]
    sys.exit(
        run_agent([f"--nnodes={args.nodes}", f"--nproc-per-node={args.gpus}", *where, *worker])
    )


def rendezvous(nodes: int) -> list[str]:
    """torchrun's flags for where the processes meet."""
    if nodes == 1:
        return ["--standalone"]
    missing = [n for n in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT") if n not in os.environ]
    if missing:
        raise ValueError(f"{nodes} nodes need {', '.join(missing)} in the environment of each")
    env = os.environ
    return [
        f"--node-rank={env['NODE_RANK']}",
        f"--master-addr={env['MASTER_ADDR']}",
        f"--master-port={env['MASTER_PORT']}",
    ]


def check_devices(processes: int, num_gpus: int) -> None:
    """One GPU per process, or none at all."""
    if 0 < num_gpus < processes:
        raise ValueError(
            f"GPUS {processes}: this node has {num_gpus} (CUDA_VISIBLE_DEVICES= runs on the CPU)"
        )


def check_split(config: Config, world_size: int) -> None:
    """The global batch must divide over processes and micro-batches."""
    parts, replicas = world_size * config.train.grad_accumulation, config.parallel.replicas
    if replicas < 1 or world_size % replicas:
        raise ValueError(f"parallel.replicas {replicas} does not divide {world_size} processes")
    if world_size < 1 or config.train.batch_size % parts:
        raise ValueError(
            f"train.batch_size {config.train.batch_size} is not a multiple of {world_size} "
            f"processes x train.grad_accumulation {config.train.grad_accumulation}"
        )
    micro = config.train.batch_size // parts
    adversary = config.adversarial
    if adversary.in_use == "vfm" and adversary.reference == "shuffled" and micro < 2:
        raise ValueError(
            "adversarial.reference shuffled needs micro-batches of two samples or more"
        )


def run_agent(arguments: list[str]) -> int:
    """torchrun in this process; SIGINT and SIGTERM are passed on, and the workers' own end awaited.

    torchrun itself would kill workers 30 s after such a signal, too soon to save a large model.
    """

    def forward(number: int, frame: FrameType | None) -> None:
        for child in psutil.Process().children():
            child.send_signal(signal.SIGTERM)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, forward)
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    try:
        torchrun.main(["--signals-to-handle=SIGHUP,SIGQUIT", *arguments])
    except ChildFailedError as error:
        return max(1, max(failure.exitcode for failure in error.failures.values()))
    return 0


def quiet_libraries() -> None:
    """Keep loading bars and notes of the libraries out of the run's own output."""
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")


def be_deterministic() -> None:
    """The same bits from the same run on GPUs too, at some cost in speed; before CUDA starts."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)


def main(module: str, recipe: Recipe) -> None:
    """Entry point of a trainer module: the launcher, or with --worker one process of the run."""
    quiet_libraries()
    logging.basicConfig(format="%(message)s")
    if "--worker" not in sys.argv:
        logging.getLogger("senseflow").setLevel(logging.INFO)
        launch(module, recipe)
        return
    config, folder, *overrides = [a for a in sys.argv[1:] if a != "--worker"]
    rank = os.environ.get("RANK", "0")
    where = "" if rank == "0" else f" (rank {rank})"
    try:
        settings = recipe.load(Path(config), overrides)
        logging.getLogger("senseflow").setLevel(logging.INFO if rank == "0" else logging.WARNING)
        if settings.train.deterministic:
            be_deterministic()
        run = prepare(settings, Path(folder), recipe.family)
        done = run.resume()
    except (ValueError, OSError) as error:
        sys.exit(f"error{where}: {error}")
    try:
        run.train(done)
    except (NonFiniteError, UnreadableImagesError, ValueError, OSError) as error:
        sys.exit(f"error{where}: {error}")
