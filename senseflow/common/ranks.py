"""The ranks of a run: joining the process group, the mesh, sums and agreements over all ranks."""

import atexit
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from senseflow.common.environment import own_position

# A rank may wait long for another that writes hundreds of GB; that one is gone is found by
# senseflow.launch.watch, or by torchrun, and not by gloo's half an hour.
PATIENCE = timedelta(hours=12)


class AgreedError(Exception):
    """An error that all ranks raise alike, in the same place: one of them says it."""


class AgreedOSError(AgreedError, OSError):
    """An error of the file system, raised alike on all ranks."""


@dataclass(frozen=True)
class Ranks:
    """This process among the others, its device, and the mesh the networks are sharded over."""

    rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes and speaks."""
        return self.rank == 0


def join_group() -> torch.device:
    """Join the process group torchrun describes, or a group of one; this process's device."""
    position = own_position()
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(kind)
    if kind == "cuda":
        device = torch.device(kind, position.local_rank)
        torch.cuda.set_device(device)
    # gloo beside NCCL: files, stops and turns are agreed on without a device.
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    if not dist.is_initialized() and "MASTER_PORT" in os.environ:
        store, *_ = next(dist.rendezvous("env://"))
        env = os.environ  # apart for each start: torchrun keeps its store over restarts
        start = f"{env.get('TORCHELASTIC_RUN_ID')}/{env.get('TORCHELASTIC_RESTART_COUNT')}"
        dist.init_process_group(
            backend,
            store=dist.PrefixStore(start, store),
            rank=position.rank,
            world_size=position.world_size,
            timeout=None if kind == "cuda" else PATIENCE,  # NCCL's own finds a GPU that hangs
        )
    elif not dist.is_initialized():
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    atexit.register(leave_group)
    return device


def leave_group() -> None:
    """At the end of the process, unless it failed: leave the group, if it is in one, so that its
    threads and connections end before what they use."""
    if dist.is_initialized():
        dist.destroy_process_group()


def start_ranks(replicas: int = 1) -> Ranks:
    """The group's ranks in a mesh.

    replicas > 1 is HSDP: that many groups, each holding every network whole in shards.
    """
    device = join_group()
    world_size = dist.get_world_size()
    if replicas > 1:
        shape, names = (replicas, world_size // replicas), ("replicate", "shard")
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    else:
        mesh = init_device_mesh(device.type, (world_size,), mesh_dim_names=("shard",))
    return Ranks(dist.get_rank(), world_size, device, mesh)


def sum_over_ranks(values: Tensor, ranks: Ranks) -> Tensor:
    """Sum a small tensor over all ranks."""
    if ranks.world_size > 1:
        dist.all_reduce(values)
    return values


def any_rank(flag: bool, ranks: Ranks) -> bool:
    """True on every rank when it is True on one: stops and skips are agreed."""
    return bool(sum_over_ranks(torch.tensor(float(flag), device=ranks.device), ranks) > 0)
