"""Rollouts: the student's own sampling carried to its end, scored, and kept to be learned from.

The sampler is a Gaussian policy (`senseflow.core.policy`), whose steps train by L_GRPO
(`senseflow.core.grpo`; DanceGRPO, arXiv 2505.07818). A rollout is backward simulation that does not
stop at the drawn anchor: its states are the inputs of all other losses of its turn as well.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from senseflow.core.draws import Draws
from senseflow.core.grpo import group_advantages, grpo_loss
from senseflow.core.path import Denoised, add_noise
from senseflow.core.policy import transition
from senseflow.data.sampler import Batch
from senseflow.distill.measures import Measures, phase
from senseflow.distill.rewards import in_unit_range, over_ranks
from senseflow.distill.state import (
    Distillation,
    Turn,
    batch_on_device,
    conditioning,
    denoise,
    on_device,
    times,
)
from senseflow.teachers.encoded import Conditioning

THUMBNAIL = 32  # pixels a side: what images of one prompt are compared at


@dataclass(frozen=True)
class Walk:
    """One micro-batch of a rollout, without gradient."""

    batch: Batch  # on the run's device
    cond: Conditioning
    states: tuple[Tensor, ...]  # x at every anchor, noisiest first, (B, C, h, w) each
    x_0: Tensor  # where it ends


@dataclass(frozen=True)
class Rollout(Walk):
    """A walk, and what came of it."""

    advantages: Tensor  # (B,)
    # Of the steps, (B,) by the anchor they leave: by the student that drew them, and the newest.
    old_log_probs: dict[int, Tensor] = field(default_factory=dict)
    log_probs: dict[int, Tensor] = field(default_factory=dict)

    def clipped(self, clip: float) -> Tensor:
        """The share of ratios that are further than `clip` from 1, 0-d."""
        old, new = (torch.stack(list(x.values())) for x in (self.old_log_probs, self.log_probs))
        return (((new - old).exp() - 1).abs() > clip).float().mean()


def draw_transitions(d: Distillation, turn: Turn, draws: Draws) -> tuple[int, ...]:
    """Which steps of a rollout train, by the anchor they leave; each as often as any other.

    That of the drawn anchor is one of them, for its prediction is made for the other losses too.
    """
    order = torch.randperm(len(turn.anchors) - 1, generator=draws.shared("transitions")).tolist()
    order.sort(key=lambda step: step != turn.anchor)
    return tuple(sorted(order[: d.config.reward.transitions]))


def resample(d: Distillation, denoised: Denoised, eps: Tensor, s: Tensor) -> Tensor:
    """x_s (B, C, h, w) as the student's sampler makes it of a prediction and fresh noise."""
    eta = d.config.reward.simulated_eta
    if eta == 1:
        return add_noise(d.adapter.path, denoised.x_0, eps, s)
    return transition(d.adapter.path, denoised, s, eta).draw(eps)


def roll_out(
    d: Distillation, turn: Turn, batches: list[Batch], measures: Measures
) -> list[Rollout]:
    """Draw, decode and score all micro-batches; advantages are of whole groups, over all ranks."""
    walks, scores, thumbnails = [], [], []
    for batch in batches:
        walks.append(walk(d, turn, batch))
        scored, small = score(d, walks[-1])
        scores.append(scored)
        thumbnails.append(small)
    assert d.rewards
    indices, num = [i for batch in batches for i in batch.indices], d.config.train.batch_size
    groups = (-1, d.config.reward.group_size)
    rewards = d.rewards.over_ranks(torch.cat(scores, 1), indices, num).unflatten(1, groups)
    seen = over_ranks(torch.cat(thumbnails, 1), indices, num, d.rewards.ranks).unflatten(1, groups)
    advantages = group_advantages(rewards, d.rewards.weights)
    measure(d, rewards, advantages, measures)
    measures.add({"grpo/diversity": diversity(seen.permute(1, 2, 0))})
    everyone = advantages.flatten()
    return [Rollout(**vars(w), advantages=everyone[w.batch.indices]) for w in walks]


@phase("rollout")
@torch.no_grad()
def walk(d: Distillation, turn: Turn, batch: Batch) -> Walk:
    """From pure noise down all anchors, and the prediction at the last."""
    batch = batch_on_device(d, batch)
    cond, states = conditioning(d, batch), [noise(d, turn, batch, 0)]
    for place, t in enumerate(turn.anchors.times):
        now = times(t, len(batch.prompts), d.device)
        denoised = denoise(d, d.generator.network, states[-1], now, cond)
        if place + 1 < len(turn.anchors):
            s = times(turn.anchors.times[place + 1], len(now), d.device)
            states.append(resample(d, denoised, noise(d, turn, batch, place + 1), s))
    return Walk(batch, cond, tuple(states), denoised.x_0)


def noise(d: Distillation, turn: Turn, batch: Batch, place: int) -> Tensor:
    """What the state at an anchor is drawn with (B, C, h, w): of each sample, or of its group.

    With reward.shared_noise a group differs by the steps that train alone, so that no other
    chance is credited to them.
    """
    reward, indices, purpose = d.config.reward, tuple(batch.indices), f"rollout {place}"
    if reward.shared_noise and place - 1 not in turn.transitions:
        indices = tuple(index // reward.group_size for index in indices)
        purpose = f"rollout of a group {place}"
    draws = Draws(d.seed, turn.iteration, indices)
    return on_device(d, draws.normal(purpose, d.adapter.latent_shape()))


@phase("reward")
@torch.no_grad()
def score(d: Distillation, walked: Walk) -> tuple[Tensor, Tensor]:
    """Rewards (R, B) of the images a micro-batch ends with, and these (D, B) at thumbnail size."""
    assert d.rewards
    images = d.adapter.decode(walked.x_0)
    small = F.adaptive_avg_pool2d(in_unit_range(images), THUMBNAIL)
    scores = d.rewards.score(images, walked.batch.prompts, walked.batch.fields)
    return scores, small.flatten(1).T


def measure(d: Distillation, rewards: Tensor, advantages: Tensor, measures: Measures) -> None:
    """Means and spreads of rewards (R, P, M) in their groups, sizes of advantages (P, M), and how
    many groups have nothing to learn from."""
    assert d.rewards
    spreads = rewards.std(-1).mean(-1)
    for scorer, mean, spread in zip(d.rewards.scorers, rewards.mean((1, 2)), spreads, strict=True):
        measures.add({f"reward/{scorer.name}": mean, f"reward_spread/{scorer.name}": spread})
    equal = (advantages == 0).all(1).float().sum()
    measures.add({"grpo/advantage": advantages.abs().mean(), "grpo/equal_groups": equal})


def diversity(pictures: Tensor) -> Tensor:
    """How far apart the pictures (P, M, D), in [0, 1], of one prompt are, 0-d.

    The root mean square of their difference, by the mean over pairs and prompts: 0 where all are
    one, 1 for white beside black. It needs no weights, so that no network can be fooled.
    """
    # Not by products of matrices, whose rounding would part pictures that are equal.
    apart: Tensor = torch.cdist(pictures, pictures, compute_mode="donot_use_mm_for_euclid_dist")
    num = pictures.shape[1]
    return apart.sum() / (len(apart) * num * (num - 1)) / math.sqrt(pictures.shape[2])


def policy_loss(
    d: Distillation, turn: Turn, rollout: Rollout, step: int, denoised: Denoised
) -> Tensor:
    """L_GRPO of one step of a micro-batch, 0-d; the gradient goes to the prediction it is made of.

    The first update's own log-probabilities are the old ones, so that no forward is made for them
    and its ratio is exactly 1, whatever type the network computes in; the clip acts from the second
    update on.
    """
    reward = d.config.reward
    s = times(turn.anchors.times[step + 1], len(denoised.x_0), d.device)
    law = transition(d.adapter.path, denoised, s, reward.eta)
    log_prob = law.log_prob(rollout.states[step + 1])
    rollout.log_probs[step] = log_prob.detach()
    old = rollout.old_log_probs.setdefault(step, log_prob.detach())
    return grpo_loss(log_prob, old, rollout.advantages, reward.clip)
