"""One process of a run, from its command line to its end."""

import logging
import os
import socket
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from senseflow.common.environment import own_position
from senseflow.common.quiet import quiet_libraries, set_up_notes
from senseflow.common.ranks import AgreedError, leave_group
from senseflow.common.signals import STARTED, StopRequest
from senseflow.config.load import check_split, load_recipe
from senseflow.config.recipes import Recipe
from senseflow.data.items import UnreadableImagesError
from senseflow.engine.build import prepare
from senseflow.engine.hold import Hold
from senseflow.engine.inputs import Inputs, read_run
from senseflow.launch.watch import Failure, Watch, report

NOTICED_S = 1  # in which the launcher, which looks ten times a second, sees a process that ended


def run_worker(recipe: Recipe, config: Path, folder: Path, overrides: list[str]) -> None:
    """One process of the run, to its end; the cause of a failure is posted for all nodes."""
    stop = StopRequest()
    position = own_position()
    watch = Watch(position.rank, position.world_size)
    failure = work(partial(read, recipe, config, overrides), folder, stop)
    if failure:
        report(failure)
        if position.world_size > 1:
            # A rank that was killed, and is why this one fails, is to be seen first.
            time.sleep(NOTICED_S)
        os._exit(1)  # not by way of libraries that may wait for a peer that is gone
    leave_group()
    watch.finish()
    stop.finish()


def read(recipe: Recipe, config: Path, overrides: list[str]) -> Inputs:
    """What the run reads; raises ValueError or OSError. Its notes are said once: by the launcher,
    or where there is none by rank 0."""
    silent = STARTED in os.environ or own_position().rank > 0
    set_up_notes(logging.ERROR if silent else logging.INFO)
    settings = load_recipe(recipe, config, overrides)
    check_split(settings, own_position().world_size)
    return read_run(settings, recipe.family)


def work(read: Callable[[], Inputs], folder: Path, stop: StopRequest) -> Failure | None:
    """What one process does; returns why it failed, if it did.

    Errors of the input, found before training, would only repeat; so would a loss that is not
    finite. A disk that fails in training may recover.
    """
    rank = own_position().rank
    final: tuple[type[Exception], ...] = (ValueError, OSError)
    here = f"rank {rank} on host {socket.gethostname()}: "
    try:
        inputs = read()
        set_up_notes(logging.INFO if rank == 0 else logging.WARNING)
        quiet_libraries()
        train = inputs.config.train
        if train.time_limit is not None:
            stop.time_limit_s = 3600 * train.time_limit
        if train.deterministic:
            be_deterministic()
        with Hold(folder, stop.launcher, lambda: stop.reason is not None, end_lost) as hold:
            run = prepare(inputs, folder, hold)
            done = run.resume()
            final = (ValueError, AgreedError, UnreadableImagesError)
            stop.save_first()
            with run.checkpoints:  # waits for a save in the background
                run.train(done, stop)
    except (ValueError, OSError, AgreedError, UnreadableImagesError) as error:
        alone = rank > 0 and not isinstance(error, AgreedError)
        return Failure(f"{here if alone else ''}{error}", isinstance(error, final))
    except Exception as error:
        return Failure(f"{here}{error!r}", trace=traceback.format_exc())
    return None


def end_lost(reason: str) -> None:
    """The end of a run in whose folder another one is: nothing is written any more."""
    report(Failure(reason, final=True))
    os._exit(1)


def be_deterministic() -> None:
    """Have GPUs, too, repeat a run bit by bit, at some cost in speed; call before CUDA starts."""
    # cuBLAS reads it once; without, its sums may come in another order each time.
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
