"""One process of a run, from its command line to its end."""

import logging
import os
import socket
import sys
import traceback
from pathlib import Path

import torch

from senseflow.common.quiet import quiet_libraries, set_up_notes
from senseflow.common.ranks import AgreedError
from senseflow.common.signals import StopRequest
from senseflow.config.load import check_split, load_recipe
from senseflow.config.recipes import Recipe
from senseflow.data.items import UnreadableImagesError
from senseflow.engine.build import prepare
from senseflow.launch.watch import Failure, Watch, report


def be_deterministic() -> None:
    """The same bits from the same run on GPUs too, at some cost in speed; before CUDA starts."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)


def run_worker(recipe: Recipe) -> None:
    """One process of the run, to its end; the cause of a failure is posted for all nodes."""
    stop = StopRequest()
    rank = int(os.environ.get("RANK", 0))
    watch = Watch(rank, int(os.environ.get("WORLD_SIZE", 1)))
    failure = work(recipe, rank, stop)
    if failure:
        report(failure)
        os._exit(1)  # not by way of libraries that may wait for a peer that is gone
    watch.finish()


def work(recipe: Recipe, rank: int, stop: StopRequest) -> Failure | None:
    """One process of the run, from its command line to the end; returns why it failed, if it did.

    Errors of the input, found before training, would only repeat; so would a loss that is not
    finite. A disk that fails in training may recover.
    """
    config, folder, *overrides = [a for a in sys.argv[1:] if a != "--worker"]
    final: tuple[type[Exception], ...] = (ValueError, OSError)
    try:
        settings = load_recipe(recipe, Path(config), overrides)  # its notes are the launcher's
        set_up_notes(logging.INFO if rank == 0 else logging.WARNING)
        quiet_libraries()
        check_split(settings, int(os.environ.get("WORLD_SIZE", 1)))
        if settings.train.time_limit is not None:
            stop.time_limit_s = 3600 * settings.train.time_limit
        if settings.train.deterministic:
            be_deterministic()
        run = prepare(settings, Path(folder), recipe.family)
        done = run.resume()
        final = (ValueError, AgreedError, UnreadableImagesError)
        with run.checkpoints:  # waits for a save in the background
            run.train(done, stop)
    except (ValueError, OSError, AgreedError, UnreadableImagesError) as error:
        alone = rank > 0 and not isinstance(error, AgreedError)
        where = f"rank {rank} on host {socket.gethostname()}: " if alone else ""
        return Failure(f"{where}{error}", isinstance(error, final))
    except Exception as error:
        where = f"rank {rank} on host {socket.gethostname()}: "
        return Failure(f"{where}{error!r}", trace=traceback.format_exc())
    return None
