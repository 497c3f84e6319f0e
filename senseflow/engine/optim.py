"""AdamW on sharded float32 masters, clipping, the learning-rate schedule, and the no-op step."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from senseflow.engine.config import LrSchedulerConfig, OptimizerConfig


@dataclass
class Trained:
    """A network that learns, with its own optimizer."""

    network: nn.Module
    optimizer: torch.optim.AdamW
    base_lr: float
    max_grad_norm: float

    @classmethod
    def build(cls, network: nn.Module, lr: float, config: OptimizerConfig) -> "Trained":
        """AdamW over every parameter of a (sharded) network, which must be float32."""
        optimizer = torch.optim.AdamW(
            network.parameters(),
            lr=lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
        )
        return cls(network, optimizer, lr, config.max_grad_norm)

    def set_lr(self, factor: float) -> float:
        """Set the learning rate of the coming step to base_lr * factor, and return it."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.base_lr * factor
        return self.base_lr * factor

    def step(self) -> Tensor:
        """Clip, step, clear the gradients; returns the gradient norm before clipping, 0-d.

        When the norm is not finite the step changes neither weights nor optimizer state: the fused
        kernel reads `found_inf` on the device, so the host does not wait.
        """
        parameters = [p for p in self.network.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        torch.nn.utils.clip_grads_with_norm_(parameters, self.max_grad_norm, norm)
        self.optimizer.found_inf = (~torch.isfinite(norm)).float()
        self.optimizer.grad_scale = None
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm


def lr_factor(iteration: int, num_iterations: int, config: LrSchedulerConfig) -> float:
    """The learning rate of iteration 1..num_iterations as a factor of the base: warm-up, decay."""
    warmup, decay = config.warmup_iterations, config.decay_iterations
    if iteration < warmup:
        return config.start_factor + (1 - config.start_factor) * iteration / warmup
    left = num_iterations - iteration
    if left < decay:
        return config.end_factor + (1 - config.end_factor) * left / decay
    return 1.0
