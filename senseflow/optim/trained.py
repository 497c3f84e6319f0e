"""AdamW on sharded masters, IDA, clipping, the learning-rate schedule, and the no-op step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial
from torch.optim.adamw import adamw

from senseflow.config.sections import LrSchedulerConfig, OptimizerConfig
from senseflow.core.ida import align_, require_alike
from senseflow.optim.compact_adamw import CompactAdamW
from senseflow.optim.resharding import reshard
from senseflow.optim.rounding import noise_of, random_words, round_stochastically, word_of
from senseflow.optim.stretches import flat_shards, fused, groups, local_shards, numbers_of


class ShardedAdamW(torch.optim.AdamW):
    """torch's fused AdamW, on the shards themselves.

    DTensor would look for a sharding of one operation on hundreds of tensors, which takes seconds
    at the first step and says what is known: all are sharded alike.
    """

    found_inf: Tensor | None = None  # 0-d float, 1 where the step is to change nothing

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # without a closure
        """Move the parameters that have a gradient."""
        for settings in self.param_groups:
            found: list[list[Tensor]] = [[] for _ in range(6)]
            cast(Any, self)._init_group(settings, *found)  # makes the first states
            *sharded, maxima, steps = found
            weights, gradients, moments, squares = map(local_shards, sharded)
            adamw(
                weights,
                gradients,
                moments,
                squares,
                maxima,
                steps,
                fused=True,
                found_inf=self.found_inf,
                amsgrad=False,
                beta1=settings["betas"][0],
                beta2=settings["betas"][1],
                lr=settings["lr"],
                weight_decay=settings["weight_decay"],
                eps=settings["eps"],
                maximize=False,
            )


@dataclass
class Trained:
    """A network that learns, with its own optimizer."""

    network: nn.Module
    optimizer: ShardedAdamW | CompactAdamW
    base_lr: float
    max_grad_norm: float

    @classmethod
    def build(
        cls, network: nn.Module, lr: float, config: OptimizerConfig, compiled: bool = False
    ) -> "Trained":
        """AdamW over every parameter of a (sharded) network, float32 or bfloat16.

        compiled: what CompactAdamW does around AdamW, by torch.compile.
        """
        parameters = list(network.parameters())
        betas, eps, decay = config.betas, config.eps, config.weight_decay
        optimizer: ShardedAdamW | CompactAdamW
        # Fused in either: the kernel reads found_inf, so the host need not wait for the norm.
        if config.states == "float32" and all(p.dtype == torch.float32 for p in parameters):
            optimizer = ShardedAdamW(
                parameters, lr=lr, betas=betas, eps=eps, weight_decay=decay, fused=True
            )
        else:
            optimizer = CompactAdamW(
                parameters,
                config.states,
                compiled,
                lr=lr,
                betas=betas,
                eps=eps,
                weight_decay=decay,
            )
        return cls(network, optimizer, lr, config.max_grad_norm)

    def set_lr(self, factor: float) -> float:
        """Set the learning rate of the coming step to base_lr * factor, and return it."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.base_lr * factor
        return self.base_lr * factor

    def step(self, seed: int | None = None) -> Tensor:
        """Clip, step, clear the gradients; returns the gradient norm before clipping, 0-d.

        seed: of stochastic rounding, another one for every step; needed where there is any. When
        the norm is not finite the step changes neither weights nor optimizer state: the fused
        kernel reads `found_inf` on the device, so the host does not wait.
        """
        reshard(self.network)  # or its next pass would be of the weights before this step
        held = (p for settings in self.optimizer.param_groups for p in settings["params"])
        gradients = [p.grad for p in held if p.grad is not None]
        norm = total_norm(gradients)
        # As a GradScaler does: 1 leaves weights, moments and the count of steps alone.
        self.optimizer.found_inf = (~torch.isfinite(norm)).float()
        if isinstance(self.optimizer, CompactAdamW):
            assert seed is not None, "stochastic rounding needs a seed"
            self.optimizer.seed = seed
            self.optimizer.grad_scale = ((norm + 1e-6) / self.max_grad_norm).clamp(min=1)
        else:
            share = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1)  # as torch's clip_grad_norm_
            torch._foreach_mul_(local_shards(gradients), share)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, sharded alike, 0-d float32 whatever type they are in;
    where they are."""
    shards, first = local_shards(gradients), gradients[0]
    # Not DTensor's own: in bfloat16 where they are, and a reduction for every one of them.
    norms = torch.stack(torch._foreach_norm(shards, 2, dtype=torch.float32))  # (N,)
    if isinstance(first, DTensor):
        placements = [Partial() if p.is_shard() else p for p in first.placements]
        squares = norms.square()
        parts = DTensor.from_local(squares, first.device_mesh, placements, run_check=False)
        norms = parts.full_tensor().to(first.device).sqrt()
    norm: Tensor = torch.linalg.vector_norm(norms)
    return norm


@torch.no_grad()
def align_networks(
    fake_score: nn.Module,
    generator: nn.Module,
    lam: float,
    taken: Tensor,
    seed: int,
    compiled: bool = False,
) -> None:
    """IDA (Eq. 9) on the shards of two networks.

    taken: 0-d float32, 1, or 0 where the generator's step was skipped and nothing is aligned.
    seed: of stochastic rounding, where they are bfloat16: at lambda = 0.97 rounding to nearest
    would stop far from the generator.
    """
    for network in (fake_score, generator):  # phi may be gathered since L_DMD
        reshard(network)
    phi, theta = list(fake_score.parameters()), list(generator.parameters())
    require_alike(phi, theta)
    if all(p.dtype == torch.float32 for p in phi):
        # Shard by shard: both are sharded alike, and Eq. 9 is elementwise.
        align_(local_shards(phi), local_shards(theta), lam, taken)
        return
    kept, other = flat_shards(phi), flat_shards(theta)
    # In groups: a network is never whole in float32 beside its bfloat16 weights.
    for group in groups(phi):
        parts = [stretch.of(kept[stretch.index]) for stretch in group]
        others = torch.cat([stretch.of(other[stretch.index]) for stretch in group])
        words = numbers_of(group, others.device), word_of(seed, others.device)
        rounded = fused(_aligned, compiled)(torch.cat(parts), others, lam, taken, *words)
        torch._foreach_copy_(parts, list(rounded.split([len(s) for s in group])))


def _aligned(
    phi: Tensor, theta: Tensor, lam: float, taken: Tensor, numbers: Tensor, seed: Tensor
) -> Tensor:
    """IDA of a group of bfloat16 elements; rounding leaves those it did not move."""
    moved = phi.float()
    align_([moved], [theta.float()], lam, taken)
    return round_stochastically(moved, noise_of(random_words(seed, numbers), 0))


def lr_factor(iteration: int, num_iterations: int, config: LrSchedulerConfig) -> float:
    """The learning rate of iteration 1..num_iterations as a factor of the base: warm-up, decay."""
    warmup, decay = config.warmup_iterations, config.decay_iterations
    if iteration < warmup:
        return config.start_factor + (1 - config.start_factor) * iteration / warmup
    left = num_iterations - iteration
    if left < decay:
        return config.end_factor + (1 - config.end_factor) * left / decay
    return 1.0
