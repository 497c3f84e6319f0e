"""A data set of one sample without content, what a cache would know of it, and rewards of it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from senseflow.cache.encoders import fields_of
from senseflow.common.ranks import Ranks, sum_over_ranks
from senseflow.config.config import Config
from senseflow.data.cache_index import Field
from senseflow.data.cached import Cache
from senseflow.data.items import Item, Position
from senseflow.distill.rewards import RewardError, Rewards, Scorer
from senseflow.engine.inputs import Inputs, Setup, read_setup
from senseflow.engine.rewards import Named, Score, open_rewards, parts_of
from senseflow.teachers.encoded import NOTHING, Conditioning, Encoded, Posterior
from senseflow.teachers.family import DataKind, Family

PlanData = DataKind | Literal["cached", "prompts"]
"""What a run reads: images; an LMDB of latents; what a cache knows of prompts and of images, and
those that are looked at; prompts alone."""

LONG_PROMPT = "a " * 512  # words: no scorer reads as many


@dataclass(frozen=True)
class BlankPrompts:
    """Zeros for every prompt, in place of a cache's encodings, where shapes alone are asked."""

    fields: dict[str, Field]
    text: Field | None  # the VFM discriminator's features

    @classmethod
    def of(cls, setup: Setup) -> "BlankPrompts":
        """In the shapes that a cache of this configuration has."""
        vfm = setup.config.adversarial.in_use == "vfm"
        text = fields_of("clip", setup)["text"] if vfm else None
        return cls(fields_of("prompts", setup), text)

    def conditioning(self, prompt: str) -> Conditioning:
        """Zeros, B = 1, in the shapes of any prompt."""
        return Conditioning(**{name: zeros(field) for name, field in self.fields.items()})


@dataclass(frozen=True)
class Blank:
    """A data set of one sample: zeros, in the shapes that `kind` of data has."""

    resolution: tuple[int, int]
    latent_shape: tuple[int, int, int]  # of what is trained
    posterior_shape: tuple[int, int, int]  # of what the VAE says
    kind: PlanData
    prompts: BlankPrompts | None  # of a cache
    see_images: bool  # also where a cache knows their latents

    def fingerprint(self) -> str:
        """A name that no data set has."""
        return "blank"

    def __len__(self) -> int:
        return 1

    def __getitem__(self, position: Position) -> Item:
        if self.kind == "latents":
            return Item("a", position.index, latents=torch.zeros(self.latent_shape))
        seen = self.kind != "prompts" and (self.see_images or self.prompts is None)
        image = torch.zeros(3, *self.resolution) if seen else None
        return Item("a", position.index, image=image, encoded=self._encoded())

    def all_prompts(self) -> Iterator[str]:
        """The prompt of the one sample."""
        return iter(["a"])

    def _encoded(self) -> Encoded:
        if self.prompts is None:
            return NOTHING
        latents = torch.zeros(1, *self.posterior_shape)
        text = None if self.prompts.text is None else zeros(self.prompts.text)
        return Encoded(self.prompts.conditioning("a"), text, Posterior(latents, latents.clone()))


def blank_inputs(config: Config, family: Family, kind: PlanData) -> Inputs:
    """What a run of this configuration reads, with nothing in it but the teacher's config files."""
    setup = read_setup(config, family)
    prompts = BlankPrompts.of(setup) if kind == "cached" else None
    blank = Blank(
        config.train.resolution,
        family.latent_shape(setup.settings),
        family.posterior_shape(setup.settings),
        kind,
        prompts,
        see_images=config.adversarial.in_use == "vfm",
    )
    text_dim = prompts.text.shape[0] if prompts and prompts.text else None
    return setup.with_data(blank, Cache(prompts, text_dim=text_dim))


class BlankRewards(Rewards):
    """Rewards without numbers: nothing is asked whether it is finite, but for one that failed."""

    def over_ranks(self, scores: Tensor, indices: list[int], num: int) -> Tensor:
        """(R, num) of this rank's (R, b)."""
        self.require_finite(scores, self.scorers)
        return sum_over_ranks(scores.new_zeros(len(scores), num), self.ranks)

    def require_finite(self, scores: Tensor, scorers: Sequence[Scorer]) -> None:
        """Raise RewardError where a reward could not be traced: its scores would be free."""
        if self.faults:
            raise RewardError(f"reward {self.faults[0]}")


def blank_rewards(config: Config, ranks: Ranks) -> Rewards | None:
    """The rewards of a configuration, on prompts of as many words as any reads; each of a user's
    own is a mean, as what it holds and computes is not known."""
    opened = open_rewards(config, ranks, mean_of_pixels)
    if opened is None:
        return None
    return BlankRewards([replace(s, score=on_long_prompts(s.score)) for s in opened.scorers], ranks)


def mean_of_pixels(name: str) -> Named:
    """In place of a user's own, which is not imported; raises ValueError for what names none."""
    parts_of(name)
    return Named(name, True, lambda _: (lambda images, prompts: images.mean((1, 2, 3)), None))


def on_long_prompts(score: Score) -> Score:
    """The scorer, whatever prompts it is given."""
    return lambda images, prompts: score(images, [LONG_PROMPT] * len(prompts))


def zeros(field: Field) -> Tensor:
    """A row of a cache, (1, ...), on the host; in a mask of prompts nothing is padding."""
    return torch.full_like(field.rows(1), field.dtype == "bool", device="cpu")
