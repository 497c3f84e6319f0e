"""Tokenizers and text encoders of the embedded teachers: real CLIP and T5, a toy vocabulary."""

import itertools
from pathlib import Path

import torch
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from senseflow.tiny.captions import CAPTION_WORDS

CLIP_LENGTH = 16
# T5 attends to its padding in FLUX, so training and inference must pad to one length: pass this as
# `max_sequence_length` wherever a prompt is encoded. A caption has at most 11 tokens with its end.
T5_LENGTH = 12
WIDTH = 64


def byte_pair_vocabulary(words: tuple[str, ...]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a byte-pair tokenizer that keeps each of `words` in one piece.

    The end token has the highest id, which is where CLIP towers read their pooled vector.
    """
    merges: list[tuple[str, str]] = []
    for word in words:
        pieces = [*word[:-1], word[-1] + "</w>"]
        for left, right in merges:
            while (left, right) in (pairs := list(itertools.pairwise(pieces))):
                at = pairs.index((left, right))
                pieces[at : at + 2] = [left + right]
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces[:2] = [pieces[0] + pieces[1]]
    letters = sorted(set("".join(words)))
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    tokens += [left + right for left, right in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}, merges


def new_clip_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer of the caption words, padded to 16."""
    vocabulary, merges = byte_pair_vocabulary(CAPTION_WORDS)
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CLIP_LENGTH)


def new_t5_tokenizer() -> T5Tokenizer:
    """A T5 tokenizer of the caption words, padded to 12."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0)]
    pieces += [(f"\N{LOWER ONE EIGHTH BLOCK}{word}", -1.0) for word in CAPTION_WORDS]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=T5_LENGTH)


def new_clip_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained CLIP text encoder of width 64."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CLIP_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def new_t5_encoder(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """An untrained T5 encoder of width 64, without dropout."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=WIDTH,
        d_kv=16,
        d_ff=2 * WIDTH,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=16,
        relative_attention_max_distance=16,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
        use_cache=False,
    )
    return T5EncoderModel(config)


class FluxText(nn.Module):
    """Both FLUX text encoders with their tokenizers, as FluxPipeline calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.clip_tokenizer, self.t5_tokenizer = new_clip_tokenizer(), new_t5_tokenizer()
        self.clip = new_clip_encoder(self.clip_tokenizer)
        self.t5 = new_t5_encoder(self.t5_tokenizer)

    def save(self, folder: Path) -> None:
        """Write both encoders; the tokenizers are made anew by `load`."""
        self.clip.save_pretrained(folder / "clip")
        self.t5.save_pretrained(folder / "t5")

    @classmethod
    def load(cls, folder: Path) -> "FluxText":
        """The encoders of a folder that `save` wrote, in eval mode."""
        text = cls()
        text.clip = CLIPTextModel.from_pretrained(folder / "clip")
        text.t5 = T5EncoderModel.from_pretrained(folder / "t5")
        return text.eval()

    def tokenize(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids of `prompts`, padded: CLIP (B, 16) and T5 (B, 12)."""
        tokenizers = (self.clip_tokenizer, self.t5_tokenizer)
        clip, t5 = (
            tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
            for tokenizer in tokenizers
        )
        return clip, t5

    def forward(
        self, clip_ids: torch.Tensor, t5_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Pooled CLIP vectors (B, 64) and T5 states (B, 12, 64) of token ids."""
        return self.clip(clip_ids).pooler_output, self.t5(t5_ids).last_hidden_state
