"""Prompts of more tokens than the text encoders read: that their ends are left out is said."""

import logging
import textwrap
from dataclasses import asdict, dataclass
from typing import Any

from diffusers import DiffusionPipeline

from senseflow.teachers.chat import num_tokens
from senseflow.teachers.family import Family, Plan

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cut:
    """Tokens of a prompt, those of begin and end among them, for one text encoder."""

    read: int
    of: int


Cuts = dict[str, Cut]  # by the text encoders that do not read all of a prompt


def find_cuts(
    stock: DiffusionPipeline, family: Family, plan: Plan, prompts: list[str]
) -> list[Cuts]:
    """Which text encoders of a pipeline leave out the end of which prompt."""
    cuts: list[Cuts] = [{} for _ in prompts]
    for name, tokenizer in stock.components.items():
        encoder = name.replace("tokenizer", "text_encoder")
        if not name.startswith("tokenizer") or stock.components.get(encoder) is None:
            continue
        chosen = plan.max_sequence_length if name == family.tokenizer else None
        most = chosen or tokenizer.model_max_length
        chat = family.chat if name == family.tokenizer else None
        for cut, num in zip(cuts, num_tokens(tokenizer, prompts, chat), strict=True):
            if num > most:
                cut[encoder] = Cut(most, num)
    return cuts


def warn_of_cuts(prompts: list[str], cuts: list[Cuts]) -> None:
    """One line, however many prompts are cut."""
    found = [(prompt, cut) for prompt, cut in zip(prompts, cuts, strict=True) if cut]
    if found:
        prompt, cut = found[0]
        logger.warning(
            "warning: %d of %d prompts are longer than the text encoders read, and their ends are "
            "left out, such as of %r (%s)",
            len(found), len(prompts), textwrap.shorten(prompt, 60, placeholder=" ..."), said(cut),
        )  # fmt: skip


def in_sidecar(cut: Cuts) -> dict[str, Any]:
    """What the sidecar of an image says; nothing where all of the prompt was read."""
    return {"cut": {name: asdict(one) for name, one in cut.items()}} if cut else {}


def said(cut: Cuts) -> str:
    """Such as "text_encoder reads 77 of 95 tokens"."""
    return ", ".join(f"{name} reads {one.read} of {one.of} tokens" for name, one in cut.items())
