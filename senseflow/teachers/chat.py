"""Prompts put to a language model as a user's turn, by its tokenizer's own chat template or by one
of the family's.

Light: torch is imported where it is called.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from senseflow.common.files import read_json

if TYPE_CHECKING:
    from torch import Tensor

MARK = re.compile(r"<\|\w+\|>")  # a special token, such as <|im_start|>


@dataclass(frozen=True)
class Chat:
    """How a family's pipeline asks a language model for the encoding of a prompt."""

    thinking: bool  # enable_thinking of the tokenizer's own template
    layers: tuple[int, ...]  # hidden states, joined on channels; 0: what the first layer is given
    template: str | None = None  # with {} for the prompt; None: the tokenizer's own

    @property
    def facts(self) -> dict[str, Any]:
        """What encodings depend on besides the files of tokenizer and encoder, as JSON has it."""
        own = {"enable_thinking": self.thinking} if self.template is None else {}
        given = {"template": self.template} if self.template else {}
        return {**own, **given, "hidden states": list(self.layers)}

    def worded(self, tokenizer: Any, prompts: list[str]) -> list[str]:
        """What the tokenizer is given to read: each prompt's turn, and how an answer begins."""
        if self.template is not None:
            return [self.template.replace("{}", prompt) for prompt in prompts]
        return [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}],
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=self.thinking,
            )
            for prompt in prompts
        ]

    def head(self, tokenizer: Any) -> int:
        """Tokens before the prompt of a template of the family's own, whose states are dropped."""
        before, _, _ = (self.template or "").partition("{}")
        return len(tokenizer(before)["input_ids"]) if before else 0

    def encode(
        self, encoder: Any, tokenizer: Any, prompts: list[str], length: int | None
    ) -> "tuple[Tensor, Tensor]":
        """States (B, L, D x layers) of prompts cut and padded to L = `length` tokens, without
        gradient, and, on the host, where there are tokens, (B, L) bool."""
        import torch

        from senseflow.common.devices import to_device

        assert length is not None  # families that ask so let it be chosen
        head = self.head(tokenizer)
        tokens = tokenizer(
            self.worded(tokenizer, prompts),
            padding="max_length",
            truncation=True,
            max_length=head + length,
            return_tensors="pt",
        )
        names = ("input_ids", "attention_mask")
        ids, mask = (to_device(tokens[name], encoder.device) for name in names)
        # transformers looks at its numbers, which on the meta device are none
        unmasked = dict.fromkeys(encoder.config.get_text_config().layer_types)
        with torch.no_grad():
            states = encoder(
                ids,
                attention_mask=unmasked if mask.is_meta else mask,
                output_hidden_states=list(self.layers),
                use_cache=False,
            ).hidden_states
        joined = torch.cat([states[layer] for layer in self.layers], dim=-1)
        return joined[:, head:], tokens["attention_mask"][:, head:].bool()


def num_tokens(tokenizer: Any, prompts: list[str], chat: Chat | None) -> list[int]:
    """The tokens of each prompt, uncut, as its encoding counts them: with those that the tokenizer
    adds at its ends, or with its turn's where a language model is asked."""
    texts = chat.worded(tokenizer, prompts) if chat else prompts
    head = chat.head(tokenizer) if chat else 0
    return [len(ids) - head for ids in tokenizer(texts, verbose=False)["input_ids"]]


def require_chat(tokenizer: Path, given: str | None = None) -> None:
    """Raise ValueError for a tokenizer's folder without a chat template, or whose vocabulary lacks
    a special token that the template writes: it would be read as the letters of its name.

    given: the template, where it is not the tokenizer's own.
    """
    if not tokenizer.is_dir():
        raise ValueError(f"{tokenizer}: there is no such folder")
    template = given or chat_template(tokenizer)
    if template is None:
        raise ValueError(
            f"{tokenizer} has no chat template (chat_template.jinja, or chat_template in "
            "tokenizer_config.json), by which this teacher's prompts are encoded"
        )
    known = special_tokens(tokenizer)
    if absent := sorted(set(MARK.findall(template)) - known):
        whose = "the" if given else "its"
        raise ValueError(
            f"{tokenizer} does not know {', '.join(absent)}, which {whose} chat template writes: "
            "it is another model's tokenizer"
        )


def chat_template(tokenizer: Path) -> str | None:
    """The chat template of a tokenizer's folder, where it has one."""
    file, config = tokenizer / "chat_template.jinja", tokenizer / "tokenizer_config.json"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = (read_json(config) if config.is_file() else {}).get("chat_template")
    # One that has several of them names each.
    return template if template is None or isinstance(template, str) else json.dumps(template)


def special_tokens(tokenizer: Path) -> set[str]:
    """The tokens that a tokenizer's folder adds to its vocabulary, wherever it says so."""
    found: set[str] = set()
    for name in ("tokenizer.json", "tokenizer_config.json", "added_tokens.json"):
        tree = read_json(tokenizer / name) if (tokenizer / name).is_file() else {}
        found |= {token["content"] for token in tree.get("added_tokens", ())}
        found |= {token["content"] for token in tree.get("added_tokens_decoder", {}).values()}
        found |= {key for key in tree if MARK.fullmatch(key)}
    return found
