"""Tokenizers and text encoders of the embedded teachers: real CLIP and T5, a toy vocabulary."""

import itertools
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerBase,
    Qwen2Tokenizer,
    Qwen3Config,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from senseflow.teachers.chat import Chat
from senseflow.teachers.text_encoders import CHAT_TEMPLATE
from senseflow.tiny.captions import CAPTION_WORDS

N = TypeVar("N", bound=nn.Module)

CLIP_LENGTH = 16  # of FLUX's and the discriminator's towers
SHORT_CLIP_LENGTH = 12  # of SD3.5's and SDXL's: the longest caption, with its start and end
# T5 attends to its padding in FLUX, so training and inference must pad to one length: pass this as
# `max_sequence_length` wherever a prompt is encoded. A caption has at most 11 tokens with its end.
T5_LENGTH = 12
WIDTH = 64
END = "<|endoftext|>"  # CLIP's last token
CLIP_WIDTHS = (32, 48)  # of SDXL's and SD3.5's two towers
SD35_T5_WIDTH = 96
QWEN_LENGTH = 24  # a caption of ten words, and the fourteen tokens of its turn
QWEN_WIDTH = 32


def byte_pair_vocabulary(
    words: tuple[str, ...],
    first: tuple[str, ...],
    last: tuple[str, ...] = ("<|startoftext|>", END),
    end: str = "</w>",
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a byte-pair tokenizer that keeps each of `words` in one piece.

    The vocabulary begins with the tokens `first` and ends with `last`: CLIP's end token has the
    highest id, which is where its towers read their pooled vector. end: behind each word's last
    letter.
    """
    merges: list[tuple[str, str]] = []
    for word in words:
        pieces = [*word[:-1], word[-1] + end]
        for left, right in merges:
            while (left, right) in (pairs := list(itertools.pairwise(pieces))):
                at = pairs.index((left, right))
                pieces[at : at + 2] = [left + right]
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces[:2] = [pieces[0] + pieces[1]]
    letters = sorted(set("".join(words)))
    tokens = [*first, *letters, *(letter + end for letter in letters)]
    tokens += [left + right for left, right in merges]
    tokens += last
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}, merges


def new_clip_tokenizer(length: int = CLIP_LENGTH, pad: str = END) -> CLIPTokenizer:
    """A CLIP tokenizer of the caption words, padded to `length`.

    pad: the second one of SDXL and SD3.5 pads with "!" (id 0), others with their end token.
    """
    vocabulary, merges = byte_pair_vocabulary(CAPTION_WORDS, () if pad == END else (pad,))
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=length, pad_token=pad)


def new_t5_tokenizer() -> T5Tokenizer:
    """A T5 tokenizer of the caption words, padded to 12."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0)]
    pieces += [(f"\N{LOWER ONE EIGHTH BLOCK}{word}", -1.0) for word in CAPTION_WORDS]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=T5_LENGTH)


def clip_config(tokenizer: CLIPTokenizer, width: int = WIDTH) -> CLIPTextConfig:
    """A CLIP text tower of two layers for `tokenizer`."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def new_t5_encoder(tokenizer: T5Tokenizer, width: int = WIDTH) -> T5EncoderModel:
    """An untrained T5 encoder, without dropout."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=16,
        d_ff=2 * width,
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


class Text(nn.Module):
    """The text encoders of one family with their tokenizers, in the order of its pipeline."""

    def __init__(
        self, tokenizers: list[PreTrainedTokenizerBase], encoders: list[nn.Module]
    ) -> None:
        super().__init__()
        self.tokenizers, self.encoders = tokenizers, nn.ModuleList(encoders)

    def tokenize(self, prompts: list[str]) -> list[torch.Tensor]:
        """Token ids of `prompts` (B, L), padded, one tensor per tokenizer."""
        return [
            tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
            for tokenizer in self.tokenizers
        ]

    def components(self) -> dict[str, Any]:
        """Tokenizers and encoders by the names that diffusers pipelines give them."""
        names = ["", *(f"_{i + 1}" for i in range(1, len(self.encoders)))]
        encoders = {f"text_encoder{n}": e for n, e in zip(names, self.encoders, strict=True)}
        tokenizers = {f"tokenizer{n}": t for n, t in zip(names, self.tokenizers, strict=True)}
        return {**encoders, **tokenizers}


class FluxText(Text):
    """CLIP for the pooled vector and T5 for the sequence."""

    def __init__(self) -> None:
        tokenizers = [new_clip_tokenizer(), new_t5_tokenizer()]
        clip = CLIPTextModel(clip_config(tokenizers[0]))
        super().__init__(tokenizers, [clip, new_t5_encoder(tokenizers[1])])

    def forward(self, ids: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompt embeddings (B, 12, 64) and pooled (B, 64) of token ids."""
        clip, t5 = self.encoders
        return t5(ids[1]).last_hidden_state, clip(ids[0]).pooler_output


class SDXLText(Text):
    """Two CLIP towers: penultimate states side by side, the second's projection as pooled."""

    def __init__(self) -> None:
        tokenizers = [
            new_clip_tokenizer(SHORT_CLIP_LENGTH),
            new_clip_tokenizer(SHORT_CLIP_LENGTH, pad="!"),
        ]
        first = CLIPTextModel(clip_config(tokenizers[0], CLIP_WIDTHS[0]))
        second = CLIPTextModelWithProjection(clip_config(tokenizers[1], CLIP_WIDTHS[1]))
        super().__init__(tokenizers, [first, second])

    def forward(self, ids: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompt embeddings (B, 12, 80) and pooled (B, 48) of token ids."""
        outputs = [
            encoder(i, output_hidden_states=True)
            for encoder, i in zip(self.encoders, ids, strict=True)
        ]
        states = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return states, outputs[1].text_embeds


class SD35Text(Text):
    """Two CLIP towers with projections, side by side and padded to T5's width, then T5 after."""

    def __init__(self) -> None:
        tokenizers = [
            new_clip_tokenizer(SHORT_CLIP_LENGTH),
            new_clip_tokenizer(SHORT_CLIP_LENGTH, pad="!"),
            new_t5_tokenizer(),
        ]
        clips = [
            CLIPTextModelWithProjection(clip_config(tokenizer, width))
            for tokenizer, width in zip(tokenizers[:2], CLIP_WIDTHS, strict=True)
        ]
        super().__init__(tokenizers, [*clips, new_t5_encoder(tokenizers[2], SD35_T5_WIDTH)])

    def forward(self, ids: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompt embeddings (B, 24, 96) and pooled (B, 80) of token ids."""
        *clips, t5 = self.encoders
        outputs = [
            encoder(i, output_hidden_states=True) for encoder, i in zip(clips, ids[:2], strict=True)
        ]
        states = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        states = F.pad(states, (0, SD35_T5_WIDTH - states.shape[-1]))
        prompt_embeds = torch.cat([states, t5(ids[2]).last_hidden_state], dim=1)
        return prompt_embeds, torch.cat([output.text_embeds for output in outputs], dim=-1)


def new_qwen_tokenizer(length: int = QWEN_LENGTH) -> Qwen2Tokenizer:
    """Qwen's, of the caption words, with a chat template shorter than its own."""
    spoken = (*CAPTION_WORDS, "user", "assistant")
    words = (*spoken, *(f"Ġ{word}" for word in spoken))  # bytes of a space before, as Qwen has it
    vocabulary, merges = byte_pair_vocabulary(words, ("Ċ",), (END,), end="")
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary,
        merges=merges,
        model_max_length=length,
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=CHAT_TEMPLATE,
    )
    tokenizer.add_tokens(["<think>", "</think>"])
    return tokenizer


def new_qwen3(
    kind: type[N], tokenizer: Qwen2Tokenizer, num_layers: int, width: int = QWEN_WIDTH
) -> N:
    """An untrained Qwen3, with or without a head that says words."""
    return kind(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=num_layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            tie_word_embeddings=True,
            max_position_embeddings=QWEN_LENGTH,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


class ChatText(Text):
    """A language model, asked as a family's pipeline asks it."""

    def __init__(self, chat: Chat, tokenizer: Qwen2Tokenizer, encoder: nn.Module) -> None:
        super().__init__([tokenizer], [encoder])
        self.chat, self.head = chat, chat.head(tokenizer)

    def tokenize(self, prompts: list[str]) -> list[torch.Tensor]:
        """Token ids (B, L) of the prompts' turns, padded."""
        return super().tokenize(self.chat.worded(self.tokenizers[0], prompts))

    def seen(self, ids: list[torch.Tensor]) -> torch.Tensor:
        """Which of the tokens that are encoded are no padding: (B, L - head) bool."""
        seen: torch.Tensor = ids[0] != self.tokenizers[0].pad_token_id
        return seen[:, self.head :]

    def forward(self, ids: list[torch.Tensor]) -> torch.Tensor:
        """Hidden states side by side (B, L - head, D x layers) of token ids."""
        (encoder,) = self.encoders
        # Nobody reads what a head would say.
        spared = {"logits_to_keep": 1} if hasattr(encoder, "lm_head") else {}
        states = encoder(
            ids[0],
            attention_mask=(ids[0] != self.tokenizers[0].pad_token_id).long(),
            output_hidden_states=list(self.chat.layers),
            use_cache=False,
            **spared,
        ).hidden_states
        joined = torch.cat([states[layer] for layer in self.chat.layers], dim=-1)
        return joined[:, self.head :]
