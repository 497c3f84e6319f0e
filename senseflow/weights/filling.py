"""Networks on the meta device are given memory and their weights, whole or in shards."""

from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from senseflow.weights.meta import NetworkSource
from senseflow.weights.stored import Stored

CPU = torch.device("cpu")


def whole(source: NetworkSource, device: torch.device = CPU) -> nn.Module:
    """A network with its weights on one device, not sharded; one on "meta" has none."""
    if device.type != "meta":
        fill_shards(source.network, source.read, device)
    return source.network


def channels_last(network: nn.Module) -> nn.Module:
    """The same network, its convolutions' weights in the layout that kernels compute in: nothing is
    copied from and to another one. Results differ by rounding."""
    # not by Module.to, which takes one layout and refuses weights of other dimensions
    layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
    for weight in network.parameters():
        if weight.dim() in layouts:
            weight.data = weight.data.contiguous(memory_format=layouts[weight.dim()])
    return network


def fill_shards(
    network: nn.Module,
    read: Callable[[str], Stored],
    device: torch.device,
    offload: bool = False,
) -> None:
    """Materialise a sharded meta network on `device` and fill its parameters and buffers.

    offload: the parameters in host memory, as `shard` was told.

    read: the tensor of a name, called in the order of the state dict and then for the buffers that
    stand in none; of it this rank's rows alone are read. Raises ValueError for a tensor that `read`
    does not know (KeyError) or knows in another shape.
    """
    materialise(network, device, offload)
    with torch.no_grad():
        for key, value in (network.state_dict() | dict(network.named_buffers())).items():
            try:
                source = read(key)
            except KeyError as error:
                raise ValueError(f"{key} is neither in the weights nor computed") from error
            if source.shape != value.shape:
                raise ValueError(
                    f"{key} is {list(source.shape)} in the weights and {list(value.shape)} by "
                    "config.json"
                )
            if isinstance(value, DTensor):
                # By rows: whole tensors on all ranks of a node would fill its memory while loading.
                shape, offset = compute_local_shape_and_global_offset(
                    value.shape, value.device_mesh, value.placements
                )
                rows = tuple(slice(o, o + s) for o, s in zip(offset, shape, strict=True))
                value.to_local().copy_(source[rows])
            else:
                value.copy_(source[...])


def materialise(network: nn.Module, device: torch.device, offload: bool = False) -> None:
    """Give a sharded meta network memory on `device`, or, with offload, its parameters in host
    memory."""
    network.to_empty(device="cpu" if offload else device)
    if offload:
        # No unit gathers buffers: they must be where the forward runs.
        for module in network.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))
