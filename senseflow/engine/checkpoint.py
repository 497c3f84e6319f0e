"""Full-state checkpoints that are complete or absent, also written while the run goes on.

A checkpoint is a torch distributed checkpoint of every trained network (with buffers), its
optimizer and the student's EMA; the iteration number is nearly all the rest, because schedules,
data position and random draws are functions of it. It stands in a manifest, with what is known of
skipped steps (`senseflow.engine.skips`). A checkpoint is written beside its place and renamed when
whole; the manifest's digests tell a damaged one, and the one before it is used. Rank 0 alone lists
and names folders, since listings of a network file system may be stale on the others.
"""

import io
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.storage import WriteResult

from senseflow.common.devices import one_thread
from senseflow.common.fields import leaves
from senseflow.common.files import PARTIAL, write_whole
from senseflow.common.ranks import Ranks
from senseflow.engine.checkpoint_folders import (
    MANIFEST,
    complete_checkpoints,
    damage_in,
    pass_over,
    read_manifest,
    step_name,
)
from senseflow.engine.checkpoint_reader import EMA, IndexedReader, Planner
from senseflow.engine.disk import (
    HostGroup,
    cause,
    empty_folder,
    publish,
    remove,
    remove_partials,
    writing,
)
from senseflow.engine.staging import stager_of
from senseflow.optim.ema import Ema
from senseflow.optim.trained import Trained

logger = logging.getLogger(__name__)


State = dict[str, Any]  # nested, of sharded tensors


@dataclass
class Checkpoints:
    """The `checkpoints/` and `last_iter` of a run folder.

    asynchronous: `save` returns when the state is copied to host memory; the rest happens in the
    background. As a context manager it waits for that.
    """

    run: Path
    keep_last: int
    ranks: Ranks
    asynchronous: bool = False
    host: HostGroup = field(init=False)
    pending: Future[None] | None = field(default=None, init=False)
    stager: AsyncStager | None = field(default=None, init=False)  # to host memory that it keeps
    seconds: float = field(default=0.0, init=False)  # that the last save took, from call to end
    damaged: set[str] = field(default_factory=set, init=False)
    used: bool = field(default=False, init=False)  # a checkpoint was written or read

    def __post_init__(self) -> None:
        self.host = HostGroup(self.ranks)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait()
        except (OSError, RuntimeError) as failure:  # RuntimeError: another rank is gone
            if error is None:
                raise
            logger.error("%s", failure)

    @property
    def folder(self) -> Path:
        """Where the checkpoints of the run are."""
        return self.run / "checkpoints"

    def save(
        self,
        iteration: int,
        trained: dict[str, Trained],
        ema: Ema | None = None,
        after: Callable[[State], None] | None = None,
        facts: dict[str, Any] | None = None,
    ) -> Path:
        """Write `checkpoints/step_<iteration>` whole, then remove the oldest beyond keep_last.

        facts: what else the manifest says. after: what else is done with the saved state, once the
        checkpoint is there. Waits for the save before. Raises OSError on all ranks when the disk is
        full or the folder gone; what was there before stays. A save that fails in the background
        says so at once; the next one is then not left to the background.
        """
        failed = not self._succeeded()
        began = time.monotonic()

        def finish(state: State) -> None:
            if after:
                after(state)
            self.seconds = time.monotonic() - began

        state = full_state(trained, ema)
        manifest = {"iteration": iteration, **(facts or {})}
        if self.asynchronous and not failed:
            state = self._on_host(state)
            executor = one_thread("checkpoint", self.ranks.device)
            self.pending = executor.submit(self._write_later, manifest, state, finish)
            executor.shutdown(wait=False)
        else:
            self._write(manifest, state, finish)
        return self.folder / step_name(iteration)

    def _on_host(self, state: State) -> State:
        """A copy in host memory, which training no longer changes; the next save writes over it."""
        if self.stager is None:
            pinned = self.ranks.device.type == "cuda"
            self.stager = stager_of(pinned=pinned)
        return cast(State, self.stager.stage(state))

    def wait(self) -> None:
        """Until the save in the background is done; raises its OSError, on all ranks."""
        pending, self.pending = self.pending, None
        if pending:
            pending.result()

    def _succeeded(self) -> bool:
        """Whether the save in the background, if there was one, did; it has said if not."""
        try:
            self.wait()
        except OSError:
            return False
        return True

    def _write_later(
        self, manifest: dict[str, Any], state: State, after: Callable[[State], None]
    ) -> None:
        try:
            self._write(manifest, state, after)
        except OSError as error:
            if self.ranks.is_main:
                logger.error("%s", error)
            raise

    def _write(
        self, manifest: dict[str, Any], state: State, after: Callable[[State], None]
    ) -> None:
        final, partial = self.folder / step_name(manifest["iteration"]), self.folder / PARTIAL
        with writing(final):
            try:
                self.host.on_main(lambda: self._begin(partial))
                writer = _Writer(str(partial))
                self.host.on_all(lambda: self._write_state(writer, state))
                digests = self.host.gather(writer.fs.digests)
                files = {name: digest for mine in digests for name, digest in mine.items()}
                whole = {**manifest, "files": files}
                # The manifest last: a folder that has one is whole.
                self.host.on_main(lambda: self._finish(partial, final, whole))
            except OSError:
                if self.ranks.is_main:
                    shutil.rmtree(partial, ignore_errors=True)
                raise
        after(state)

    def _begin(self, partial: Path) -> None:
        """On rank 0: an empty `.partial`, in place of what an earlier save left."""
        if self.used and not self.folder.is_dir():
            logger.warning("%s is gone, with what was in it: making it again", self.folder)
        empty_folder(partial)

    def _write_state(self, writer: "_Writer", state: State) -> None:
        # On gloo, apart: in the background its collectives must not meet those of training.
        dcp.save(state, storage_writer=writer, process_group=self.host.group)

    def _finish(self, partial: Path, final: Path, manifest: dict[str, Any]) -> None:
        """On rank 0: the manifest, the name, and then the oldest."""
        write_whole(partial / MANIFEST, json.dumps(manifest, indent=1))
        publish(partial, final)
        self.damaged.discard(final.name)
        write_whole(self.run / "last_iter", f"{manifest['iteration']}\n")
        self.used = True
        self._prune()

    def _prune(self) -> None:
        """Remove what is older than the last `keep_last` good ones; students stay."""
        complete = complete_checkpoints(self.folder)
        # Damaged ones do not count, or keep_last of them would push out the last good one.
        good = [folder for folder in complete if folder.name not in self.damaged]
        if self.keep_last and good:
            oldest = good[-self.keep_last :][0]
            for folder in complete[: complete.index(oldest)]:
                remove(folder)

    def newest(self) -> tuple[int, Path] | None:
        """Iteration and folder of the newest undamaged checkpoint, None where there is none at all;
        says what it passes over. Raises ValueError where all are damaged."""
        listing = self.host.on_main(self._listing)
        for folder, manifest in listing:
            logger.info("reading whether %s is whole", folder)  # minutes, of hundreds of GB
            damage = self.host.first(damage_in(folder, manifest, self.host.share))
            if damage is None:
                return manifest["iteration"], folder
            self.damaged.add(folder.name)
            pass_over(folder, damage, is_last=folder == listing[-1][0])
        return None

    def _listing(self) -> list[tuple[Path, dict[str, Any]]]:
        """Complete checkpoints with their manifests, newest first; removes unfinished ones."""
        remove_partials(self.folder)
        return [(f, read_manifest(f)) for f in reversed(complete_checkpoints(self.folder))]

    def load(self, folder: Path, trained: dict[str, Trained], ema: Ema | None = None) -> None:
        """Read a checkpoint into the networks and optimizers, in place.

        An EMA that it does not hold starts from its network, which is said. Raises ValueError when
        its keys do not fit the networks of this configuration.
        """
        reader = IndexedReader(folder)
        held = set(reader.index.state_dict_metadata)
        has_ema = any(key.startswith(EMA) for key in held)
        state = full_state(trained, ema if has_ema else None)
        stored = without_idle(state, held)
        wanted = {key for key, value in leaves(stored).items() if isinstance(value, torch.Tensor)}
        missing = sorted(wanted - held)
        if missing:
            raise ValueError(
                f"{folder} does not hold this configuration's networks: {len(missing)} keys are "
                f"missing, such as {', '.join(missing[:5])}"
            )
        try:
            dcp.load(
                stored, storage_reader=reader, planner=Planner(), process_group=self.host.group
            )
        except (dcp.CheckpointException, ValueError) as error:
            raise ValueError(f"{folder} does not fit this configuration: {cause(error)}") from error
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
        self.used = True
        if ema and not has_ema:
            ema.restart()
            if self.ranks.is_main:
                logger.info("%s holds no EMA: it starts from the student as it is", folder)


def full_state(trained: dict[str, Trained], ema: Ema | None) -> State:
    """Everything a checkpoint holds, by reference."""
    state: State = {"ema": ema.shards} if ema else {}
    for name, part in trained.items():
        fresh = not part.optimizer.state
        network, optimizer = get_state_dict(part.network, part.optimizer)
        if fresh:  # torch made the states of a first step by taking an empty one: uncount it
            named = cast(dict[str, Any], optimizer["state"])
            for values in (*part.optimizer.state.values(), *named.values()):
                values["step"].zero_()
        state[name] = {"network": network, "optimizer": optimizer}
    return state


def without_idle(state: State, held: Collection[str]) -> State:
    """Everything but the optimizer's states of parameters of which a checkpoint holds none: they
    never had a gradient, as the words' half of a last block of which the image alone is asked.

    held: the checkpoint's keys.
    """
    stepped = {key.rpartition(".")[0] for key in held}
    found = {**state}
    for name in state.keys() - {"ema"}:
        prefix, optimizer = f"{name}.optimizer.state.", state[name]["optimizer"]
        states = {key: s for key, s in optimizer["state"].items() if prefix + key in stepped}
        if states:  # else all are missing
            found[name] = {**state[name], "optimizer": {**optimizer, "state": states}}
    return found


def students(state: State) -> dict[str, dict[str, Tensor]]:
    """The tensors of the student and, if there is one, its EMA, by their folders in a run."""
    network = state["generator"]["network"]
    assert state.get("ema", {}).keys() <= network.keys()
    # Buffers are not averaged: the EMA's folder has the student's.
    return {"student": network} | ({"ema": network | state["ema"]} if "ema" in state else {})


class _Writer(dcp.FileSystemWriter):
    """Knows the sha256 of what this rank has written, and raises the disk's own error, where torch
    raises one about its container's positions.
    """

    fs: "_DigestedFiles"

    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        self.fs = _DigestedFiles()

    def write_data(
        self, plan: SavePlan, planner: SavePlanner
    ) -> torch.futures.Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise


class _DigestedFiles(FileSystem):
    """This rank's files; digests are taken while they are written: hundreds of GB are not read."""

    def __init__(self) -> None:
        self.digests: dict[str, str] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        with super().create_stream(path, mode) as stream:
            digested = _Digested(stream)
            yield digested
        self.digests[Path(path).name] = digested.sha256.hexdigest()

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.digests[Path(new_path).name] = self.digests.pop(Path(path).name)


class _Digested(io.BufferedIOBase):
    """A file that is written from its beginning to its end."""

    def __init__(self, stream: io.IOBase) -> None:
        self.stream: Any = stream
        self.sha256 = sha256()

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        return int(self.stream.write(data))

    def tell(self) -> int:
        return int(self.stream.tell())

    def flush(self) -> None:
        self.stream.flush()

    def fileno(self) -> int:
        return int(self.stream.fileno())
