"""Files that all ranks share: errors are agreed, what is written is whole or absent.

A folder is written as `.partial*` beside its place, its files are synced, it is renamed, and its
parent is synced. A kill at any moment leaves it complete or absent; so does a power cut, as far as
the disk keeps what it acknowledged to fsync, and what is removed for it goes only after that.
"""

import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.tensor import DTensor, Shard

from senseflow.common.environment import own_position
from senseflow.common.files import PARTIAL
from senseflow.common.ranks import PATIENCE, AgreedOSError, Ranks

T = TypeVar("T")

SHARED_WITHIN_S = 90  # network file systems may hide a new folder for a minute


class HostGroup:
    """All ranks on a gloo group of their own, for files and the host's memory.

    Its collectives may run in the background: they never meet those of training. Every method must
    be called by all ranks, in the same order.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.rank, self.is_main = ranks.rank, ranks.is_main
        self.world_size = ranks.world_size
        # One rank meets nobody: another group's thread would wake a hundred times a second for it.
        alone = ranks.world_size == 1
        group = dist.group.WORLD if alone else dist.new_group(backend="gloo", timeout=PATIENCE)
        assert isinstance(group, dist.ProcessGroup), "this rank is one of them"
        self.group = group

    def on_main(self, action: Callable[[], T]) -> T:
        """Rank 0 alone acts; all ranks get its result, or raise the same AgreedOSError."""
        told: list[Any] = [None, None]
        if self.is_main:
            try:
                told[0] = action()
            except OSError as error:
                told[1] = str(error)
        dist.broadcast_object_list(told, src=0, group=self.group)
        if told[1] is not None:
            raise AgreedOSError(told[1])
        return cast(T, told[0])

    def on_all(self, action: Callable[[], object]) -> None:
        """Every rank acts; when one fails, all raise the same AgreedOSError."""
        failure = None
        try:
            action()
        except (OSError, CheckpointException) as error:
            failure = cause(error)
        if failure := self.first(failure):
            raise AgreedOSError(failure)

    def on_first_of_node(self, action: Callable[[], object]) -> None:
        """The first rank of every node acts, the others wait; when one fails, all raise the same
        ValueError."""
        failure = None
        try:
            if own_position().local_rank == 0:
                action()
        except ValueError as error:
            failure = str(error)
        if failure := self.first(failure):
            raise ValueError(failure)

    def first(self, mine: str | None) -> str | None:
        """The first rank's words, if any has some."""
        return next((words for words in self.gather(mine) if words), None)

    def share(self, names: list[str]) -> list[str]:
        """Every world_size-th name, from this rank's own on: the files it looks after."""
        return names[self.rank :: self.world_size]

    def gather(self, mine: T) -> list[T]:
        """One small object of every rank, on all of them."""
        parts: list[Any] = [None] * self.world_size
        dist.all_gather_object(parts, mine, group=self.group)
        return parts

    def whole(self, value: Tensor, dtype: torch.dtype) -> Tensor | None:
        """A sharded tensor in rank 0's host memory, in `dtype`; None on the others.

        Each shard is cast where it is and travels once, from the first replica that holds it, into
        its rows: no rank needs more than the tensor itself.
        """
        local = value.to_local() if isinstance(value, DTensor) else value
        local = local.detach().to("cpu", dtype).contiguous()
        if not isinstance(value, DTensor):
            return local if self.is_main else None
        mesh = value.device_mesh.mesh
        assert value.placements[-1] == Shard(0), value.placements
        holders = mesh.reshape(-1, mesh.shape[-1])[0].tolist()  # in the order of their rows
        if not self.is_main:
            if self.rank in holders and local.numel():
                dist.send(_bytes(local), 0, group=self.group)
            return None
        whole = torch.empty(value.shape, dtype=dtype)
        # Sharded as `chunk` splits rows, which may leave the last holders without any.
        for holder, rows in zip(holders, whole.chunk(len(holders)), strict=False):
            if holder == 0:
                rows.copy_(local)
            elif rows.numel():
                dist.recv(_bytes(rows), holder, group=self.group)
        return whole


def _bytes(tensor: Tensor) -> Tensor:
    """The memory of a contiguous tensor, (num bytes,) uint8."""
    return tensor.view(-1).view(torch.uint8)


def cause(error: BaseException) -> str:
    """What went wrong in one line; a CheckpointException holds it by rank."""
    failures = getattr(error, "failures", None) or {}
    words = "; ".join(sorted({str(f[0]) or repr(f[0]) for f in failures.values()})) or str(error)
    return " ".join(words.split())


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """An OSError inside says which file or folder could not be written, and what to do next."""
    try:
        yield
    except OSError as error:
        raise type(error)(
            f"writing {path} failed: {error}. Finished checkpoints are as they were: mend this, "
            "then run the command again"
        ) from error


def share_folder(folder: Path, host: HostGroup, within_s: float = SHARED_WITHIN_S) -> None:
    """Make a run folder; OSError on all ranks unless it can be written and all ranks see it."""
    token = folder / f".shared-{uuid.uuid4()}"

    def make() -> Path:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            token.write_text("seen by all ranks of a run\n")
        except OSError as error:
            raise OSError(f"SAVE_DIR {folder} cannot be written: {error}") from error
        return token

    def look(made: Path) -> None:
        end = time.monotonic() + within_s
        while not (folder / made.name).exists():
            if time.monotonic() > end:
                raise OSError(
                    f"SAVE_DIR {folder} is not shared: {socket.gethostname()} does not see what "
                    "rank 0 made in it. It must be on a file system that all nodes mount"
                )
            time.sleep(0.2)

    made = host.on_main(make)
    try:
        host.on_all(lambda: look(made))
    finally:
        if host.is_main:
            token.unlink(missing_ok=True)


def empty_folder(folder: Path) -> None:
    """Make a folder, in place of what an earlier run left there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def publish(partial: Path, final: Path) -> None:
    """Give a finished folder its name, durably, in place of an earlier one of that name."""
    # In this order a power cut leaves a whole folder under this name, or none.
    sync(partial)
    remove(final)
    partial.rename(final)
    sync(final.parent)


def remove(folder: Path) -> None:
    """Remove a folder that counts as finished until its name is gone."""
    if folder.exists():
        # Renamed first: a kill in the middle leaves no half of it under a name that counts.
        gone = folder.with_name(f"{PARTIAL}_old_{folder.name}")
        shutil.rmtree(gone, ignore_errors=True)
        folder.rename(gone)
        shutil.rmtree(
            gone, ignore_errors=True
        )  # what a reader still holds goes with the next start


def remove_partials(folder: Path) -> None:
    """Remove what a killed run left unfinished."""
    for partial in folder.glob(PARTIAL + "*"):
        shutil.rmtree(partial, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
