"""Between its passes a network may stay gathered; its shards are its own again before they move."""

from collections.abc import Iterator
from typing import Any, cast

from torch import nn
from torch.distributed.fsdp import FSDPModule

from senseflow.weights.lora import Role


def reshard(network: nn.Module) -> None:
    """Free what is gathered of a network, to be called before its shards are read or written.

    With `parallel.reshard_after_forward: false` a network stays gathered, and its modules then hold
    whole parameters in the compute type: not what is optimized, and stale after the next step.
    A role of a LoRA run is freed with its shared base. Nothing happens where nothing is gathered.
    """
    for group in _groups(network):
        group.reshard()


def learns_again(network: nn.Module) -> None:
    """Tell FSDP2 of gradients' types, once a network that was frozen is to learn.

    torch 2.11 reads them at the first pass, of the parameters that learn: of a network that was
    frozen then there are none, and its gradients would not be cast to the type of its masters.
    """
    for group in _groups(network):
        if getattr(group, "_orig_dtype", True) is None:  # newer ones have no such name
            group._init_mp_dtypes()


def _groups(network: nn.Module) -> Iterator[Any]:
    """FSDP2's groups of parameters, one for each of its units that has some."""
    whole = network.base.network if isinstance(network, Role) else network
    if isinstance(whole, FSDPModule):
        # FSDP2's own list, of all units once there was a pass: to walk FLUX's modules takes 2 ms.
        for unit in cast(Any, whole)._get_fsdp_state()._state_ctx.all_states:
            if unit._fsdp_param_group:
                yield unit._fsdp_param_group
