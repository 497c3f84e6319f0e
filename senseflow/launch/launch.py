"""From a checked configuration to running processes: meet the other nodes, run torchrun's agent.

`senseflow.launch.entry` comes before; each process is `senseflow.launch.worker`, a fork of this
one, which has imported the libraries of the networks and has asked no device.
"""

import gc
import logging
import os
import signal
import socket
import stat
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import elastic_launch

from senseflow.common.quiet import quiet_libraries
from senseflow.common.signals import Forwarder, signal_at_end_of
from senseflow.config.config import Config
from senseflow.engine.compilation import check_compile
from senseflow.engine.inputs import Inputs, check_offload, read_run
from senseflow.launch.meeting import FIRST_MEETING_S, Meeting, NodeGoneError, place_from
from senseflow.launch.watch import Failure, post, posted, say
from senseflow.teachers.family import Family

logger = logging.getLogger(__name__)

AFTER_FAILURE_S = 15  # for all launchers to meet: their workers see a failure within a beat
BEFORE_RESTART_S = 60  # where it is worth more patience
UNSAID = Failure(
    f"a process on {socket.gethostname()} ended without a cause (see above)", gravity=-1
)
NOT_COUNTED = 255  # the exit code of a fork that could not count the GPUs
AGAIN = "Run the same command again: it goes on from the last complete checkpoint"

Worker = Callable[[], None]  # one process of the run, to its end


def launch(
    worker: Worker,
    config: Config,
    family: Family,
    nodes: int,
    gpus: int,
    max_restarts: int,
    stop: Forwarder,
) -> int:
    """Start `gpus` processes on this node and wait for their end; returns the exit code.

    Raises ValueError or OSError for what is wrong with the input, before they are started.
    """
    place = place_from(dict(os.environ), nodes)
    inputs = read_run(config, family)
    num_gpus = count_gpus()
    check_devices(gpus, num_gpus)
    check_offload(config.parallel.offload, num_gpus)
    check_compile(config.parallel, num_gpus)
    load_libraries(inputs, num_gpus)
    stop.forward()
    try:
        meeting = Meeting(place, nodes, lambda: stop.reason is not None)
        return train(meeting, gpus, worker, max_restarts, stop)
    except NodeGoneError:
        if not stop.reason:
            raise
        logger.info("stopped by %s before the processes were started", stop.reason)
        return 0


def count_gpus() -> int:
    """How many GPUs this node has, asked by a fork: CUDA works in no fork of one that asked.

    Raises ValueError where the fork could not say: no answer is not the answer 0, a run on the CPU.
    """
    child, found = os.fork(), NOT_COUNTED
    if child == 0:
        try:
            found = torch.cuda.device_count()
        finally:
            # At once: whatever was raised, a fork must not go on as a second launcher.
            os._exit(found)
    found = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if not 0 <= found < NOT_COUNTED:  # negative: killed by a signal
        raise ValueError("the GPUs of this node could not be counted: does nvidia-smi list them?")
    return found


def load_libraries(inputs: Inputs, num_gpus: int) -> None:
    """Import what the forks need, once for all of them, and look whether the networks' weights fit.

    Libraries that ask for devices while they are imported are told what `count_gpus` found.
    bitsandbytes, which peft would import where it is installed, asks the driver itself: it is left
    to the forks. Raises ValueError.
    """
    told = patch.multiple(
        torch.cuda, is_available=lambda: num_gpus > 0, device_count=lambda: num_gpus
    )
    with told, hidden("bitsandbytes"):
        import senseflow.launch.worker  # noqa: F401 - diffusers and transformers: seconds
        from senseflow.engine.build import check_networks

        quiet_libraries()
        check_networks(inputs)


@contextmanager
def hidden(library: str) -> Iterator[None]:
    """Inside, a library that is not imported yet is not there."""
    modules = cast(dict[str, Any], sys.modules)
    modules.setdefault(library, None)
    try:
        yield
    finally:
        if modules[library] is None:
            del modules[library]


def check_devices(processes: int, num_gpus: int) -> None:
    """One GPU per process, or none at all."""
    if 0 < num_gpus < processes:
        raise ValueError(
            f"GPUS {processes}: this node has {num_gpus} (CUDA_VISIBLE_DEVICES= runs on the CPU)"
        )


def train(meeting: Meeting, gpus: int, worker: Worker, max_restarts: int, stop: Forwarder) -> int:
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
        if interface := meeting.interface():
            # gloo would take that of the host's name, which is often the loopback.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        failures = run_agent([*meeting.flags(run_id), f"--nproc-per-node={gpus}"], worker)
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


def run_agent(flags: list[str], worker: Worker) -> dict[int, ProcessFailure]:
    """torchrun's agent in this process, once, until all workers ended; what failed, by rank.

    Stop signals are not the agent's: it would kill workers 30 s after one, too soon to save a large
    model. Nor does it restart (see `train`).
    """
    words = ["--signals-to-handle=SIGQUIT", "--max-restarts=0", "--start-method=fork", *flags, "-"]
    config, *_ = torchrun.config_from_args(torchrun.parse_args(words))

    launcher = os.getpid()

    def begin() -> None:
        leave_launcher(launcher)
        try:
            worker()
        except Exception:  # a defect: torchrun would keep it to itself
            traceback.print_exc()
            raise

    set_notes_of_torchrun(logging.CRITICAL)
    try:
        elastic_launch(config, begin)()
    except ChildFailedError as error:
        return error.failures
    except dist.DistError as error:
        raise NodeGoneError(f"another node is gone: {' '.join(str(error).split())}") from error
    return {}


def set_notes_of_torchrun(level: int) -> None:
    """What it says of the end of its processes is said here."""
    for name in ("torch.distributed", "torch.multiprocessing"):
        logging.getLogger(name).setLevel(level)


def leave_launcher(launcher: int) -> None:
    """In a new fork: let go of what is the launcher's alone, but for the fork's own life.

    Its sockets would live as long as this process, and so its peers would not hear of its end; in
    their place is nothing, as its objects may still close them.
    """
    # What waits for the other ranks while it loads would wait for ever without their launcher.
    signal_at_end_of(launcher, signal.SIGKILL)
    gc.freeze()  # those objects are not for this process to end
    set_notes_of_torchrun(logging.NOTSET)
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        if descriptor > 2 and is_socket(descriptor):
            os.dup2(nothing, descriptor)
    os.close(nothing)


def is_socket(descriptor: int) -> bool:
    """Whether an open file is a socket."""
    try:
        return stat.S_ISSOCK(os.fstat(descriptor).st_mode)
    except OSError:  # that of the list of descriptors itself
        return False
