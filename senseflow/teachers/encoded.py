"""What the frozen encoders say of prompts and images, whoever ran them and when."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor

Change = Callable[[Tensor], Tensor]


def is_mask(tensor: Tensor) -> bool:
    """Whether a tensor of a batch stays on the host when the others go to a device."""
    return tensor.dtype == torch.bool


class Batched:
    """A dataclass of tensors, None where there is none, whose first dimension is the batch's."""

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are there, by the names of their fields."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def cat(self, *others: Self) -> Self:
        """All batches, one after the other."""
        every = [batch.tensors for batch in (self, *others)]
        return type(self)(**{key: torch.cat([t[key] for t in every]) for key in every[0]})

    def map(self, change: Change) -> Self:
        """The batch with `change` applied to every tensor."""
        return type(self)(**{name: change(tensor) for name, tensor in self.tensors.items()})


@dataclass(frozen=True)
class Conditioning(Batched):
    """Encoded prompts; a family has the same tensors for all, of one length L in a run.

    A shorter prompt is padded to L. Where the network must not see that, `mask` says so, and the
    family's `predict` hands on a mask, or lists of tokens without padding. It stays on the host
    (`is_mask`), where its lists are cut without waiting for a device.
    """

    prompt_embeds: Tensor  # (B, L, D)
    pooled: Tensor | None = None  # (B, P)
    mask: Tensor | None = None  # (B, L) bool, False at padding that is not to be seen

    @property
    def lengths(self) -> list[int]:
        """The tokens of each prompt before its padding; all L where tensors hold no numbers, as
        plans have them."""
        assert self.mask is not None
        if type(self.mask) is not Tensor or self.mask.is_meta:
            return [self.mask.shape[1]] * len(self.mask)
        return [sum(row) for row in self.mask.tolist()]

    def expand(self, num: int) -> Self:
        """One encoded prompt (B = 1) for `num` samples."""
        return self.map(lambda tensor: tensor.expand(num, *tensor.shape[1:]))


@dataclass(frozen=True)
class Posterior(Batched):
    """What a VAE says of images: mean and standard deviation (B, C, h, w), float32, unscaled."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, mean: Tensor, std: Tensor) -> "Posterior":
        """A VAE's own, laid out as a cache keeps them: sums of either are then equal to the bit."""
        return cls(mean.float().contiguous(), std.float().contiguous())


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
        """What is known, with every tensor of it changed alike."""
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
