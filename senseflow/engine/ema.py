"""The exponential moving average of the student's weights, sharded as they are."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Ema:
    """e <- decay e + (1 - decay) theta at every move of a network; buffers are not averaged.

    shards: by state-dict key, sharded and typed (float32) like the network's own parameters.
    """

    decay: float
    network: nn.Module
    shards: dict[str, Tensor]

    @classmethod
    def start(cls, network: nn.Module, decay: float) -> "Ema":
        """The average of one network: a copy of its parameters as they are."""
        return cls(decay, network, {k: p.clone() for k, p in _parameters(network).items()})

    def update(self) -> None:
        """Once after every step that moved the network; each rank averages its own shards."""
        theta = _local(_parameters(self.network))
        torch._foreach_lerp_(_local(self.shards), theta, 1 - self.decay)

    def restart(self) -> None:
        """Forget the past: the average is the network as it is."""
        torch._foreach_copy_(_local(self.shards), _local(_parameters(self.network)))


def _parameters(network: nn.Module) -> dict[str, Tensor]:
    """By the keys of a state dict, which know nothing of what is wrapped around a block."""
    state = network.state_dict(keep_vars=True)
    return {key: value.detach() for key, value in state.items() if isinstance(value, nn.Parameter)}


def _local(shards: dict[str, Tensor]) -> list[Tensor]:
    return [s.to_local() if isinstance(s, DTensor) else s for s in shards.values()]
