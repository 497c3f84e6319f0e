"""A pipeline with conventions of its own: one masked T5, no pooled vector, guidance from 0 on."""

from typing import Any, ClassVar

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

POOLED = 32  # zeros that the transformer is given


class MadeUpPipeline(StableDiffusion3Pipeline):
    """StableDiffusion3Pipeline with a T5 in the place of its first CLIP."""

    _optional_components: ClassVar[list[str]] = [
        *StableDiffusion3Pipeline._optional_components,
        *("text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3"),
    ]

    @property
    def guidance_scale(self) -> float:
        """cond + w (cond - uncond), which its parent counts from 1."""
        return self._guidance_scale + 1

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 0

    def encode(self, prompts: list[str], length: int) -> tuple[Tensor, Tensor]:
        """(B, L, D), and (B, L) where there are tokens."""
        tokens = self.tokenizer(
            prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).to(self.text_encoder.device)
        mask = tokens.attention_mask
        seen = None if mask.is_meta else mask  # transformers looks whether all are seen
        return self.text_encoder(tokens.input_ids, attention_mask=seen)[0], mask.bool()

    def encode_prompt(
        self, prompt: list[str], *_: Any, max_sequence_length: int = 16, **__: Any
    ) -> tuple[Tensor, ...]:
        """Padding is hidden from the transformer: its states are zeros."""
        both = []
        for prompts in (prompt, [""] * len(prompt)):
            embeds, mask = self.encode(prompts, max_sequence_length)
            both.append(embeds * mask[..., None])
        pooled = torch.zeros(len(prompt), POOLED).to(both[0])
        return *both, pooled, pooled
