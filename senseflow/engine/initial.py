"""What a run may begin with in the teacher's place: the networks of another run, or a student.

A 1-step student goes on from a 4-step one in this way (`paths.initial`). Iterations, optimizers and
EMA begin anew; the run's own checkpoints, once there are any, come before all this.
"""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from torch import Size, nn

from senseflow.common.hub_names import said_missing
from senseflow.engine.checkpoint_folders import (
    MANIFEST,
    complete_checkpoints,
    damage_in,
    find_checkpoint,
    read_manifest,
    unreadable,
)
from senseflow.engine.checkpoint_reader import OpenCheckpoint
from senseflow.engine.disk import HostGroup
from senseflow.teachers.family import Family
from senseflow.teachers.weights import in_diffusers_names
from senseflow.weights.lora_files import is_lora
from senseflow.weights.meta import NetworkSource
from senseflow.weights.stored import Stored, Weights
from senseflow.weights.student import find_student, open_weights

TRAINED = ("generator", "fake_score", "discriminator")

Initial = dict[str, Weights]  # of each network by name, of those there are
Choose = Callable[[Path], Path]  # the checkpoint that a run folder or checkpoint stands for


def newest(path: Path) -> Path:
    """The newest checkpoint with a good list of tensors; what it holds is not read."""
    return find_checkpoint(path, unreadable)[0]


def heads_of(run: Path) -> dict[str, Size]:
    """Shapes of the heads' tensors by name in a run's newest checkpoint whose list of tensors is
    good; none where there is no such checkpoint."""
    for folder in reversed(complete_checkpoints(run / "checkpoints")):
        if unreadable(folder, read_manifest(folder)) is None:
            stored = OpenCheckpoint(folder)
            names = stored.under("discriminator.network.")
            return {name: stored.shapes[key].size for name, key in names.items()}
    return {}


def newest_undamaged(path: Path, host: HostGroup) -> Path:
    """The newest undamaged one; every rank reads a share of the files, and all choose alike."""

    def damage(folder: Path, manifest: dict[str, Any]) -> str | None:
        return host.first(damage_in(folder, manifest, host.share))

    return find_checkpoint(path, damage)[0]


def open_initial(path: Path, choose: Choose = newest) -> Initial:
    """The networks of a run folder or checkpoint; of a student in any form, the generator alone.

    Tensors are read when asked for. Raises ValueError when the path is none of these.
    """
    if not path.exists():
        raise ValueError(
            f"paths.initial {path} {said_missing(path)} (null: begin with the teacher, or go on "
            "from the run's own checkpoint)"
        )
    if not is_run(path):
        weights = open_weights(find_student(path).weights)
        if is_lora(weights.keys):
            raise ValueError(f"paths.initial {path} is a LoRA: a run of lora.rank begins with it")
        return {"generator": weights}
    folder = choose(path)
    stored = OpenCheckpoint(folder)
    kept = {name: stored.under(f"{name}.network.") for name in TRAINED}
    return {name: stored.weights(keys) for name, keys in kept.items() if keys}


def is_run(path: Path) -> bool:
    """Whether full states are kept there: a run folder with checkpoints, or one of them."""
    return path.parent.name == "checkpoints" or (path / "checkpoints").is_dir()


def identity(path: Path) -> str:
    """A digest that differs for other networks: of the manifest, or of the student's file list."""
    if is_run(path):
        return hashlib.sha256((newest(path) / MANIFEST).read_bytes()).hexdigest()
    file = find_student(path).weights
    # The beginning alone: ranks compare this at every start, and a student may have 24 GB.
    with file.open("rb") as stream:
        return hashlib.sha256(f"{file.stat().st_size}".encode() + stream.read(2**20)).hexdigest()


def begun_with(initial: Initial, name: str, family: Family, source: NetworkSource) -> NetworkSource:
    """A network with its initial weights in place of the teacher's, if there are any.

    Raises ValueError naming the keys when they are another network's.
    """
    if name not in initial:
        return source
    config = dict(cast(Any, source.network).config)
    weights = in_diffusers_names(family, initial[name], config)
    return replace(source, read=reader(weights, source.network, source.read))


def reader(
    weights: Weights, network: nn.Module, other: Callable[[str], Stored]
) -> Callable[[str], Stored]:
    """Where a network's tensors are read: in `weights`; what no state dict holds, in `other`."""
    weights.require(network.state_dict())
    held = set(weights.keys)
    return lambda key: weights.read(key) if key in held else other(key)
