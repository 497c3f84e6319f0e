"""Rewards on a sampler's steps: advantages within a group, and the clipped policy gradient (GRPO,
arXiv 2402.03300; on images DanceGRPO, arXiv 2505.07818)."""

from collections.abc import Sequence

import torch
from torch import Tensor

FLOOR = 1e-8  # added to a group's spread; DanceGRPO's


def group_advantages(rewards: Tensor, weights: Sequence[float], limit: float = 5.0) -> Tensor:
    """How much better than its group a sample is: (R, P, M) -> (P, M), float32, no gradient.

    rewards: of R kinds for P prompts with M samples each, the group; weights: one for each kind.
    A = clamp(sum_r w_r (r - mean_M r) / std_M r, -limit, limit): each kind is normalised first,
    so that its scale does not matter (DanceGRPO). Equal rewards are exactly 0. Raises ValueError
    for a group of 1, which has no mean to compare with.
    """
    if rewards.shape[-1] < 2:
        raise ValueError("a group of 1: an advantage needs at least 2 samples of a prompt")
    rewards = rewards.detach().float()
    # From the first of the group, or the rounding of the mean would stand for a difference
    # where all are equal, blown up by the spread it is divided by.
    rewards = rewards - rewards[..., :1]
    centred = rewards - rewards.mean(-1, keepdim=True)
    normalised = centred / (rewards.std(-1, keepdim=True) + FLOOR)
    return torch.einsum("r,rpm->pm", rewards.new_tensor(weights), normalised).clamp(-limit, limit)


def grpo_loss(log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """L = -mean min(rho A, clamp(rho, 1 - c, 1 + c) A), rho = exp(log_prob - old_log_prob).

    All of one shape, an element for each transition (GRPO; PPO's clipped objective, arXiv
    1707.06347). log_prob has the gradient of the student; old_log_prob, of the student that drew
    the transitions, and advantages are constants. Where both are one student rho is 1, and the
    gradient is REINFORCE's, -A grad log_prob.
    """
    rho = (log_prob - old_log_prob.detach()).exp()
    advantages = advantages.detach()
    # The lesser of both: a step that already went too far for its sign has no gradient left.
    return -torch.minimum(rho * advantages, rho.clamp(1 - clip, 1 + clip) * advantages).mean()
