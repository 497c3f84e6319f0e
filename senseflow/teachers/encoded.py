"""What the frozen encoders say of prompts and images, whoever ran them and when."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts; a family has the same tensors for all, of one length L in a run.

    A shorter prompt is padded to L. Where the network must not see that, `mask` says so, and the
    family's `predict` hands on a mask, or lists of tokens without padding.
    """

    prompt_embeds: Tensor  # (B, L, D)
    pooled: Tensor | None = None  # (B, P)
    mask: Tensor | None = None  # (B, L) bool, False at padding that is not to be seen

    def __len__(self) -> int:
        return len(self.prompt_embeds)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Those there are, by name."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}

    def expand(self, num: int) -> "Conditioning":
        """One encoded prompt (B = 1) for `num` samples."""
        return self.map(lambda tensor: tensor.expand(num, *tensor.shape[1:]))

    def cat(self, *others: "Conditioning") -> "Conditioning":
        """All batches, one after the other."""
        every = [cond.tensors for cond in (self, *others)]
        return Conditioning(**{key: torch.cat([t[key] for t in every]) for key in every[0]})

    def map(self, change: Change) -> "Conditioning":
        """Every tensor changed alike."""
        return Conditioning(**{name: change(tensor) for name, tensor in self.tensors.items()})


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
