"""Processes, devices and sharding: one path of numerics from one CPU process to many nodes.

Student, fake score, teacher and the discriminator's heads are sharded with FSDP2, on one rank too.
The first three are built on the meta device, sharded there, and their weights read straight into
the shards: no rank ever holds a whole one. The heads are built whole on each rank first; text
encoders, VAE and DINOv2 are not sharded.
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


@dataclass(frozen=True)
class Ranks:
    """This process among the others, its device, and the mesh the networks are sharded over."""

    rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def start_ranks(replicas: int = 1) -> Ranks:
    """Join the process group torchrun describes (or a group of one), on a GPU or the CPU.

    replicas > 1 is HSDP: that many groups, each holding every network whole in shards.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0)) if kind == "cuda" else None)
    if kind == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    if not dist.is_initialized() and "MASTER_PORT" in os.environ:
        dist.init_process_group(backend)
    elif not dist.is_initialized():
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if replicas > 1:
        shape, names = (replicas, world_size // replicas), ("replicate", "shard")
        mesh = init_device_mesh(kind, shape, mesh_dim_names=names)
    else:
        mesh = init_device_mesh(kind, (world_size,), mesh_dim_names=("shard",))
    return Ranks(rank, world_size, device, mesh)


def shard(
    network: nn.Module,
    blocks: Iterable[nn.Module],
    mesh: DeviceMesh,
    compute_dtype: torch.dtype | None = None,
) -> nn.Module:
    """FSDP2: one unit per block and one for the rest; parameters become DTensors.

    The root reshards after its forward too: IDA and the optimizer write the shards between two
    forwards of one network, and an unsharded copy left behind would be stale. Gradients are reduced
    in float32. Inputs are not cast: the network's time must reach it in the adapter's own type.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for unit in (*blocks, network):
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    return network


def fill_shards(network: nn.Module, read: Callable[[str], Tensor], device: torch.device) -> None:
    """Materialise a sharded meta network on `device` and fill every shard from `read(key)`.

    read: returns the whole tensor of a state-dict key, lazily; only this rank's rows are kept.
    """
    network.to_empty(device=device)
    with torch.no_grad():
        for key, value in network.state_dict().items():
            source = read(key)
            if source.shape != value.shape:
                raise ValueError(
                    f"{key} is {list(source.shape)} in the weights and {list(value.shape)} by "
                    "config.json"
                )
            if isinstance(value, DTensor):
                shape, offset = compute_local_shape_and_global_offset(
                    value.shape, value.device_mesh, value.placements
                )
                rows = tuple(slice(o, o + s) for o, s in zip(offset, shape, strict=True))
                value, source = value.to_local(), source[rows]
            value.copy_(source)


def local_shards(network: nn.Module) -> list[Tensor]:
    """This rank's part of every parameter, as plain tensors that share its memory."""
    detached = [p.detach() for p in network.parameters()]
    return [p.to_local() if isinstance(p, DTensor) else p for p in detached]


def sum_over_ranks(values: Tensor, ranks: Ranks) -> Tensor:
    """Sum a small tensor over all ranks."""
    if ranks.world_size > 1:
        dist.all_reduce(values)
    return values


def any_rank(flag: bool, ranks: Ranks) -> bool:
    """True on every rank when it is True on one: stops and skips are agreed."""
    return bool(sum_over_ranks(torch.tensor(float(flag), device=ranks.device), ranks) > 0)
