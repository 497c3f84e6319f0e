"""From a checked configuration to running processes: meet the other nodes, run torchrun.

`senseflow.launch.entry` comes before; each process is `senseflow.launch.worker`.
"""

import argparse
import logging
import os
import signal
import socket
import sys
from dataclasses import replace

import torch
import torch.distributed as dist
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from senseflow.common.quiet import quiet_libraries
from senseflow.common.signals import Forwarder
from senseflow.config.config import Config
from senseflow.config.recipes import Recipe
from senseflow.engine.inputs import check
from senseflow.launch.meeting import FIRST_MEETING_S, Meeting, NodeGoneError, place_from
from senseflow.launch.watch import Failure, post, posted, say

logger = logging.getLogger(__name__)

AFTER_FAILURE_S = 15  # for all launchers to meet: their workers see a failure within a beat
BEFORE_RESTART_S = 60  # where it is worth more patience
UNSAID = Failure(
    f"a process on {socket.gethostname()} ended without a cause (see above)", gravity=-1
)
AGAIN = "Run the same command again: it goes on from the last complete checkpoint"


def launch(
    module: str, recipe: Recipe, args: argparse.Namespace, config: Config, stop: Forwarder
) -> None:
    """Start GPUS processes of `module` on this node; errors of the input end it at once."""
    quiet_libraries()
    try:
        place = place_from(dict(os.environ), args.nodes)
        check(config, recipe.family)
        check_devices(args.gpus, torch.cuda.device_count())
        worker = ["-m", module, "--worker", args.config, args.save_dir, *args.overrides]
        meeting = Meeting(place, args.nodes, lambda: stop.reason is not None)
        sys.exit(train(meeting, args.gpus, worker, args.max_restarts, stop))
    except (ValueError, OSError, NodeGoneError) as error:
        if stop.reason and isinstance(error, NodeGoneError):
            logger.info("stopped by %s before the processes were started", stop.reason)
            return
        sys.exit(f"error: {error}")


def set_defaults(meeting: Meeting, gpus: int) -> None:
    """What the processes read from the environment, where the user has not set it."""
    threads = max(1, len(os.sched_getaffinity(0)) // gpus)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    interface = meeting.interface()
    if interface:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def check_devices(processes: int, num_gpus: int) -> None:
    """One GPU per process, or none at all."""
    if 0 < num_gpus < processes:
        raise ValueError(
            f"GPUS {processes}: this node has {num_gpus} (CUDA_VISIBLE_DEVICES= runs on the CPU)"
        )


def train(
    meeting: Meeting, gpus: int, worker: list[str], max_restarts: int, stop: Forwarder
) -> int:
    """Start the processes, and again after a failure that need not repeat; returns the exit code.

    Starts are counted here, not by torchrun, which would restart after any failure and on each node
    by its own count. Here all launchers meet after a failure and see one cause.
    """
    start = 0
    while True:
        run_id = f"{meeting.job}.{start}"
        if not meeting.gather(f"start/{run_id}", FIRST_MEETING_S) and not stop.reason:
            raise NodeGoneError(f"not all of {meeting.nodes} nodes came to start")
        if stop.reason:
            logger.info("stopped by %s before the processes were started", stop.reason)
            return 0
        set_defaults(meeting, gpus)
        failures = run_agent([*meeting.flags(run_id), f"--nproc-per-node={gpus}", *worker])
        if not failures:
            return 0
        patience_s = BEFORE_RESTART_S if start < max_restarts else AFTER_FAILURE_S
        cause, all_met = agree_on_cause(meeting, run_id, failures, patience_s)
        start += 1
        again = start <= max_restarts and all_met and not cause.final and not stop.reason
        advice = "" if cause.gravity == 0 else f". {AGAIN}"  # an error says itself what to do
        rest = f". Restart {start} of {max_restarts}" if again else advice
        others = "; the others were stopped" if cause.gravity and meeting.nodes * gpus > 1 else ""
        say(replace(cause, message=cause.message + others + rest))
        if not again:
            return 1


def agree_on_cause(
    meeting: Meeting, run_id: str, failures: dict[int, ProcessFailure], patience_s: float
) -> tuple[Failure, bool]:
    """Why the processes of all nodes ended, the same on every node, and whether all nodes met.

    failures: of this node, by rank. patience_s: seconds for the launchers to meet.
    """
    board, mine = meeting.board(run_id), violent_death(failures) or UNSAID
    meeting.ask(lambda: post(board, mine))  # for ranks elsewhere, which may wait for these
    all_met = meeting.gather(f"failed/{run_id}", patience_s)
    cause = meeting.ask(lambda: posted(board))
    if all_met:  # and node 0, which keeps the store, leaves it last
        meeting.gather(f"told/{run_id}", patience_s if meeting.rank == 0 else 0)
    return cause or mine, all_met


def violent_death(failures: dict[int, ProcessFailure]) -> Failure | None:
    """What the first process to fail, on this node, had no chance to say itself; else None.

    SIGABRT may be NCCL's answer to the death of another.
    """
    gravity = {1: 0, -signal.SIGABRT: 1}  # by exit code; torchrun's clock counts whole seconds
    rank, first = min(
        failures.items(), key=lambda item: (item[1].timestamp, -gravity.get(item[1].exitcode, 2))
    )
    name, code = f"rank {rank} (pid {first.pid}, host {socket.gethostname()})", first.exitcode
    if code == 1:
        return None
    if code > 1:
        return Failure(f"{name} ended with exit code {code}", gravity=2)
    often = " (often: out of memory)" if code == -signal.SIGKILL else ""
    end = f"was killed by {signal.Signals(-code).name}{often}"
    return Failure(f"{name} {end}", gravity=gravity.get(code, 2))


def run_agent(arguments: list[str]) -> dict[int, ProcessFailure]:
    """torchrun in this process, once, until all workers ended; returns what failed, by rank.

    Stop signals are not torchrun's: it would kill workers 30 s after one, too soon to save a large
    model.
    """
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    try:
        torchrun.main(["--signals-to-handle=SIGQUIT", "--max-restarts=0", *arguments])
    except ChildFailedError as error:
        return error.failures
    except dist.DistError as error:
        raise NodeGoneError(f"another node is gone: {' '.join(str(error).split())}") from error
    return {}
