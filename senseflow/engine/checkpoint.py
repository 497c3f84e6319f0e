"""Full-state checkpoints that are complete or absent, and the exported student.

A checkpoint is a torch distributed checkpoint of every trained network (with buffers) and its
optimizer; the iteration number is all the rest, because schedules, data position and random draws
are functions of it. It is written beside its place and renamed when whole; a manifest of
digests tells a damaged one, and the one before it is used.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from huggingface_hub import save_torch_state_dict
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor

from senseflow.engine.optim import Trained
from senseflow.engine.parallel import Ranks, any_rank

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"


def step_name(iteration: int) -> str:
    return f"step_{iteration:07d}"


@dataclass(frozen=True)
class Checkpoints:
    """The `checkpoints/` and `last_iter` of a run folder."""

    run: Path
    keep_last: int
    ranks: Ranks

    @property
    def folder(self) -> Path:
        return self.run / "checkpoints"

    def save(self, iteration: int, trained: dict[str, Trained]) -> Path:
        """Write `checkpoints/step_<iteration>` whole, then remove the oldest beyond keep_last.

        Raises OSError when the disk is full; what was there before stays.
        """
        final, partial = self.folder / step_name(iteration), self.folder / ".partial"
        if self.ranks.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        try:
            dcp.save(_state(trained), checkpoint_id=str(partial))
        except dcp.CheckpointException as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise OSError(f"writing {final} failed: {_cause(error)}") from error
        self._seal(partial, iteration)
        if self.ranks.is_main:
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            write_whole(self.run / "last_iter", f"{iteration}\n")
            self._prune()
        dist.barrier()
        return final

    def _seal(self, partial: Path, iteration: int) -> None:
        """Every rank digests its share of the files; rank 0 writes the manifest, last."""
        files = sorted(file for file in partial.iterdir() if file.is_file())
        mine = {
            file.name: _digest(file) for file in files[self.ranks.rank :: self.ranks.world_size]
        }
        parts: list[Any] = [None] * self.ranks.world_size
        dist.all_gather_object(parts, mine)
        if self.ranks.is_main:
            manifest = {
                "iteration": iteration,
                "files": {k: v for part in parts for k, v in part.items()},
            }
            write_whole(partial / MANIFEST, json.dumps(manifest, indent=1))

    def _prune(self) -> None:
        if self.keep_last:
            for old in self._complete()[: -self.keep_last]:
                shutil.rmtree(old)

    def _complete(self) -> list[Path]:
        """Finished checkpoints, oldest first."""
        return sorted(p for p in self.folder.glob("step_*") if (p / MANIFEST).is_file())

    def newest(self) -> tuple[int, Path] | None:
        """Iteration and folder of the newest undamaged checkpoint; says what it passes over."""
        for folder in reversed(self._complete()):
            damage = self._damage(folder)
            if not any_rank(damage is not None, self.ranks):
                return _read_manifest(folder)["iteration"], folder
            if damage:
                logger.warning(
                    "checkpoint %s is damaged (%s): using the one before", folder, damage
                )
        return None

    def _damage(self, folder: Path) -> str | None:
        """What is wrong with this rank's share of a checkpoint's files; None when nothing is."""
        try:
            digests = _read_manifest(folder)["files"]
        except (ValueError, KeyError) as error:
            return f"{MANIFEST} cannot be read: {error!r}"
        for name in sorted(digests)[self.ranks.rank :: self.ranks.world_size]:
            file = folder / name
            if not file.is_file():
                return f"{name} is missing"
            if _digest(file) != digests[name]:
                return f"{name} has changed since it was written"
        return None

    def load(self, folder: Path, trained: dict[str, Trained]) -> None:
        """Read a checkpoint into the networks and optimizers, in place.

        Raises ValueError when its keys do not fit the networks of this configuration.
        """
        state = _state(trained)
        held = set(dcp.FileSystemReader(str(folder)).read_metadata().state_dict_metadata)
        missing = sorted(set(_flat_keys(state)) - held)
        if missing:
            raise ValueError(
                f"{folder} does not hold this configuration's networks: {len(missing)} keys are "
                f"missing, such as {', '.join(missing[:5])}"
            )
        try:
            dcp.load(state, checkpoint_id=str(folder))
        except (dcp.CheckpointException, ValueError) as error:
            raise ValueError(
                f"{folder} does not fit this configuration: {_cause(error)}"
            ) from error
        for name, part in trained.items():
            settings = [
                {key: group[key] for key in ("betas", "eps", "weight_decay")}
                for group in part.optimizer.param_groups
            ]
            set_state_dict(
                part.network,
                part.optimizer,
                model_state_dict=state[name]["network"],
                optim_state_dict=state[name]["optimizer"],
            )
            for group, own in zip(part.optimizer.param_groups, settings, strict=True):
                group.update(own)  # the configuration's, not those it was saved with


def _read_manifest(folder: Path) -> dict[str, Any]:
    manifest = json.loads((folder / MANIFEST).read_text())
    return {"iteration": int(manifest["iteration"]), "files": dict(manifest["files"])}


def _state(trained: dict[str, Trained]) -> dict[str, Any]:
    state = {}
    for name, part in trained.items():
        fresh = not part.optimizer.state
        network, optimizer = get_state_dict(part.network, part.optimizer)
        if fresh:  # torch made the states of a first step by taking an empty one: uncount it
            for values in (*part.optimizer.state.values(), *optimizer["state"].values()):
                values["step"].zero_()
        state[name] = {"network": network, "optimizer": optimizer}
    return state


def _flat_keys(tree: dict[str, Any], prefix: str = "") -> list[str]:
    keys = []
    for key, value in tree.items():
        if isinstance(value, dict):
            keys += _flat_keys(value, f"{prefix}{key}.")
        elif isinstance(value, torch.Tensor):
            keys.append(prefix + key)
    return keys


def _cause(error: BaseException) -> str:
    failures = getattr(error, "failures", None) or {}
    return "; ".join(sorted({str(f[0]) for f in failures.values()})) or str(error)


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_whole(file: Path, text: str) -> None:
    """Replace a small file so that a reader sees the old or the new one, never half."""
    partial = file.with_name(file.name + ".partial")
    with partial.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, file)


def export_student(
    network: nn.Module,
    component: nn.Module,
    folder: Path,
    dtype: torch.dtype,
    ranks: Ranks,
    describe: Callable[[Path], None],
) -> None:
    """Write a sharded network as a diffusers component folder; appears whole or not at all.

    component: the same architecture on the meta device, for config.json. One tensor at a time is
    gathered; rank 0 holds the whole in host memory, in `dtype`. Files are split at 10 GB.
    describe: writes what else belongs into the folder.
    """
    state = {}
    for key, value in network.state_dict().items():
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        if ranks.is_main:
            state[key] = whole.detach().to("cpu", dtype).clone()
    if ranks.is_main:
        partial = folder.with_name("." + folder.name)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        component.save_config(partial)
        save_torch_state_dict(
            state,
            partial,
            filename_pattern="diffusion_pytorch_model{suffix}.safetensors",
            max_shard_size="10GB",
        )
        describe(partial)
        for file in partial.iterdir():
            file.chmod(0o644)  # safetensors writes for its owner alone
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    dist.barrier()
