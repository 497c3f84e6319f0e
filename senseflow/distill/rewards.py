"""Rewards: what frozen scorers, or a user's own functions, say of images and their prompts.

A reward takes images (B, 3, H, W) float32 in [0, 1] on the run's device and B prompts, and returns
scores (B,), higher is better. One that asks for fields is given those of the prompts, by keyword.
What it is made of is not trained.
"""

import traceback
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from senseflow.common.ranks import AgreedError, Ranks, any_rank, sum_over_ranks


class RewardError(AgreedError):
    """A reward that failed or gave no scores; raised alike on all ranks, before anything moved."""


Fields = Sequence[dict[str, Any]]  # of each prompt: its row of a table, by column


@dataclass(frozen=True)
class Scorer:
    """One reward, ready to be asked."""

    name: str
    weight: float  # 0: measured alone
    score: Callable[..., Tensor]  # of images and prompts, and fields where it takes them
    differentiable: bool  # whether its scores carry a gradient to the images
    takes_fields: bool = False  # what a table says of each prompt
    network: nn.Module | None = None  # all that it holds, frozen; None: a function keeps its own


@dataclass
class Rewards:
    """All rewards of a run. R of them; methods that agree over ranks are called by all alike."""

    scorers: Sequence[Scorer]
    ranks: Ranks
    faults: list[str] = field(default_factory=list)  # of this rank, not yet told

    @property
    def weights(self) -> list[float]:
        """One for each reward."""
        return [scorer.weight for scorer in self.scorers]

    def score(self, images: Tensor, prompts: list[str], fields: Fields = ()) -> Tensor:
        """(R, B) float32 of decoded images (B, 3, H, W), about [-1, 1]; NaN where one failed."""
        pictures = in_unit_range(images)
        return torch.stack([self._ask(s, pictures, prompts, fields) for s in self.scorers])

    def over_ranks(self, scores: Tensor, indices: list[int], num: int) -> Tensor:
        """(R, num), of all samples of the global batch by index, from this rank's (R, b).

        Raises RewardError on all ranks for scores that are not finite on one.
        """
        everyone = over_ranks(scores, indices, num, self.ranks)
        if not everyone.isfinite().all():  # the host waits: what comes hangs on it
            self._fail(everyone, self.scorers)
        return everyone

    def loss(self, images: Tensor, prompts: list[str], fields: Fields = ()) -> Tensor:
        """-mean sum_r w_r r, 0-d, with the gradient of the rewards to images (B, 3, H, W).

        Raises RewardError on all ranks for scores that are not finite on one.
        """
        pictures, used = in_unit_range(images), [s for s in self.scorers if s.weight > 0]
        scores = torch.stack([self._ask(s, pictures, prompts, fields, True) for s in used])
        self.require_finite(scores, used)
        weights = scores.new_tensor([s.weight for s in used])
        return -(weights[:, None] * scores).sum(0).mean()

    def require_finite(self, scores: Tensor, scorers: Sequence[Scorer]) -> None:
        """Raise RewardError on all ranks for scores (R, B) that are not finite on one."""
        if any_rank(not bool(scores.isfinite().all()), self.ranks):
            self._fail(scores, scorers)

    def _ask(
        self,
        scorer: Scorer,
        pictures: Tensor,
        prompts: list[str],
        fields: Fields,
        with_gradient: bool = False,
    ) -> Tensor:
        """Scores (B,) float32; NaN, and a fault noted, where there are none."""
        fault, more = None, {"fields": deepcopy([*fields])} if scorer.takes_fields else {}
        try:
            # copies: what one changes in place is neither another's nor the iteration's
            found = scorer.score(pictures.clone(), [*prompts], **more)
        except (Exception, SystemExit) as error:  # a user's own code raises what it likes
            fault = f"raised {with_line(error)}"
        else:
            if not isinstance(found, Tensor) or found.shape != (len(prompts),):
                got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
                fault = f"returned {got} for {len(prompts)} images, not a tensor of as many scores"
            elif with_gradient and not found.requires_grad:
                fault = "says that it is differentiable, and its scores carry no gradient"
            else:
                return found.to(pictures.device, torch.float32)
        self.faults.append(f"{scorer.name} {fault}")
        return pictures.new_full((len(prompts),), torch.nan)

    def _fail(self, scores: Tensor, scorers: Sequence[Scorer]) -> None:
        """Raise RewardError: with the first fault that a rank noted, else with which of these
        scores (R, B) are not finite."""
        bad = zip(scorers, (~scores.isfinite()).sum(1).tolist(), strict=True)
        mine = [f"{s.name} is not finite for {n} of {scores.shape[1]} images" for s, n in bad if n]
        everyone: list[Any] = [(self.faults, mine)]
        if self.ranks.world_size > 1:
            everyone = [None] * self.ranks.world_size
            dist.all_gather_object(everyone, (self.faults, mine))
        noted, found = (
            [said for part in parts for said in part] for parts in zip(*everyone, strict=True)
        )
        raise RewardError(f"reward {[*noted, *found][0]}")


def with_line(error: BaseException) -> str:
    """What a user's own code raised, called in the frame that caught it, and where in its file."""
    frames = traceback.extract_tb(error.__traceback__)[1:]
    own = [frame for frame in frames if "importlib" not in frame.filename]
    lines = [frame.lineno for frame in own if frame.filename == own[0].filename]
    return f"{error!r} ({Path(own[0].filename).name}, line {lines[-1]})" if own else repr(error)


def over_ranks(values: Tensor, indices: list[int], num: int, ranks: Ranks) -> Tensor:
    """(K, num), of all samples of the global batch by index, from this rank's (K, b)."""
    everyone = values.new_zeros(len(values), num)
    everyone[:, indices] = values
    # Each place is filled by one rank: the sum is a gather, whoever holds which samples.
    return sum_over_ranks(everyone, ranks)


def in_unit_range(images: Tensor) -> Tensor:
    """Images about [-1, 1] as rewards see them, in [0, 1], float32; with their gradient."""
    return (images.float().clamp(-1, 1) + 1) / 2
