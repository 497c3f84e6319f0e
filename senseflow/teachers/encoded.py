"""What the frozen encoders say of prompts and images, whoever ran them and when."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts: prompt_embeds (B, L, D) and pooled (B, P)."""

    prompt_embeds: Tensor
    pooled: Tensor

    def expand(self, num: int) -> "Conditioning":
        """One encoded prompt (B = 1) for `num` samples."""
        return Conditioning(self.prompt_embeds.expand(num, -1, -1), self.pooled.expand(num, -1))

    def cat(self, *others: "Conditioning") -> "Conditioning":
        """All batches, one after the other."""
        every = (self, *others)
        return Conditioning(
            torch.cat([cond.prompt_embeds for cond in every]),
            torch.cat([cond.pooled for cond in every]),
        )

    def map(self, change: Change) -> "Conditioning":
        """The same with both tensors changed alike."""
        return Conditioning(change(self.prompt_embeds), change(self.pooled))


@dataclass(frozen=True)
class Posterior:
    """What a VAE says of images: mean and standard deviation (B, C, h, w), float32, unscaled."""

    mean: Tensor
    std: Tensor

    def cat(self, *others: "Posterior") -> "Posterior":
        """All batches, one after the other."""
        every = (self, *others)
        return Posterior(torch.cat([p.mean for p in every]), torch.cat([p.std for p in every]))

    def map(self, change: Change) -> "Posterior":
        """The same with both tensors changed alike."""
        return Posterior(change(self.mean), change(self.std))


@dataclass(frozen=True)
class Encoded:
    """What is known of samples without running an encoder; None: that must be run."""

    cond: Conditioning | None = None
    text: Tensor | None = None  # (B, D), the VFM discriminator's features of the prompts
    posterior: Posterior | None = None  # of the images

    @classmethod
    def stack(cls, samples: Sequence["Encoded"]) -> "Encoded":
        """Samples of B = 1, of each of which the same is known, as one batch."""
        conds = [s.cond for s in samples if s.cond is not None]
        texts = [s.text for s in samples if s.text is not None]
        posteriors = [s.posterior for s in samples if s.posterior is not None]
        return cls(
            conds[0].cat(*conds[1:]) if conds else None,
            torch.cat(texts) if texts else None,
            posteriors[0].cat(*posteriors[1:]) if posteriors else None,
        )

    def map(self, change: Change) -> "Encoded":
        """The same with all tensors changed alike."""
        return Encoded(
            self.cond and self.cond.map(change),
            None if self.text is None else change(self.text),
            self.posterior and self.posterior.map(change),
        )


NOTHING = Encoded()


class KnownPrompts(Protocol):
    """Prompts that were encoded before; they stand in for a teacher's text encoders."""

    def conditioning(self, prompt: str) -> Conditioning:
        """B = 1, on the host; raises ValueError for a prompt that is not known."""
        ...
