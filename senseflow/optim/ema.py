"""The exponential moving average of the student's weights, sharded as they are."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from senseflow.optim.stretches import local_shards


@dataclass(frozen=True)
class Ema:
    """e <- decay e + (1 - decay) theta at every move of a network; buffers are not averaged.

    shards: by state-dict key, sharded like the network's own parameters; float32 also where those
    are bfloat16: the average moves by less than a bfloat16 holds, and averages its rounding away.
    """

    decay: float
    network: nn.Module
    shards: dict[str, Tensor]

    @classmethod
    def start(cls, network: nn.Module, decay: float) -> "Ema":
        """The average of one network: a copy of its parameters as they are."""
        # A copy even of float32: theta's next step would change it with the weights.
        shards = {
            k: p.detach().to(torch.float32, copy=True) for k, p in _parameters(network).items()
        }
        return cls(decay, network, shards)

    def update(self, taken: Tensor) -> None:
        """Once after every step of the network; each rank averages its own shards.

        taken: 0-d float32, 1, or 0 where the step was skipped and the average stays; the host does
        not wait for it.
        """
        shards, theta = self._both()
        share = (1 - self.decay) * taken
        if all(p.dtype == torch.float32 for p in theta):
            torch._foreach_lerp_(shards, theta, [share] * len(shards))
        else:
            for average, p in zip(shards, theta, strict=True):  # one at a time in float32
                average.lerp_(p.float(), share)

    def restart(self) -> None:
        """Forget the past: the average is the network as it is."""
        torch._foreach_copy_(*self._both())

    def _both(self) -> tuple[list[Tensor], list[Tensor]]:
        """This rank's shards: the average's and the network's."""
        both = self.shards, _parameters(self.network)
        average, theta = (local_shards(tensors.values()) for tensors in both)
        return average, theta


def _parameters(network: nn.Module) -> dict[str, Tensor]:
    """By the keys of a state dict, which know nothing of what is wrapped around a block."""
    state = network.state_dict(keep_vars=True)
    return {key: value for key, value in state.items() if isinstance(value, nn.Parameter)}
