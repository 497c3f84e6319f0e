"""The one training loop that every network of the embedded teachers goes through."""

import math
from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import TypeVar

import torch
from torch import nn
from tqdm import tqdm

N = TypeVar("N", bound=nn.Module)


def learning_rate_factor(step: int, iterations: int, warmup: int) -> float:
    """Linear warm-up, then half a cosine down to a hundredth."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, iterations - warmup)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress))


def fit(
    loss_of: Callable[[int], torch.Tensor],
    networks: Iterable[N],
    iterations: int,
    learning_rate: float,
    name: str,
    average_decay: float | None = None,
) -> tuple[list[N], float]:
    """Minimise `loss_of(iteration)` over the parameters of `networks` with AdamW.

    Returns the networks (or, with `average_decay`, moving averages of their weights) in eval mode
    and the mean loss of the last tenth of the iterations.
    """
    networks = list(networks)
    parameters = [p for network in networks for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    warmup = min(200, iterations // 10 + 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, iterations, warmup)
    )
    averages = [deepcopy(network) for network in networks] if average_decay else networks
    tail: list[float] = []
    progress = tqdm(range(iterations), desc=name, mininterval=10, dynamic_ncols=True)
    for iteration in progress:
        loss = loss_of(iteration)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)
        optimizer.step()
        schedule.step()
        if average_decay:
            # Early averages follow closely, so that a short run is not dominated by its start.
            decay = min(average_decay, (iteration + 1) / (iteration + 10))
            with torch.no_grad():
                for average, network in zip(averages, networks, strict=True):
                    torch._foreach_lerp_(
                        [*average.parameters()], [*network.parameters()], 1 - decay
                    )
        tail = [*tail, loss.item()][-max(1, iterations // 10) :]
        progress.set_postfix(loss=f"{sum(tail[-50:]) / len(tail[-50:]):.4f}", refresh=False)
    return [network.eval() for network in averages], sum(tail) / len(tail)
