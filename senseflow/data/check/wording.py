"""Captions of a data set: empty ones, repeated ones, and those a teacher's tokenizers cut."""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from senseflow.common.files import read_json
from senseflow.config.recipes import FAMILIES
from senseflow.data.check.findings import Finding, percentiles, share
from senseflow.teachers.chat import Chat, num_tokens

TOKENIZER = "tokenizer"
BATCH = 1000  # captions per call of a tokenizer


@dataclass(frozen=True)
class Reader:
    """One tokenizer of a teacher, and how many tokens its text encoder is fed."""

    name: str  # of its folder
    limit: int
    tokenizer: Any
    chat: Chat | None = None  # by which captions are put to a language model

    def lengths(self, captions: list[str]) -> list[int]:
        """Tokens of each caption, uncut, with what the tokenizer adds at its ends, or a chat."""
        distinct, lengths = list(dict.fromkeys(captions)), dict[str, int]()
        for start in range(0, len(distinct), BATCH):
            batch = distinct[start : start + BATCH]
            lengths |= zip(batch, num_tokens(self.tokenizer, batch, self.chat), strict=True)
        return [lengths[caption] for caption in captions]


def read_tokenizers(teacher: Path, length: int | None) -> list[Reader]:
    """The tokenizers of a diffusers folder; raises ValueError naming one that cannot be read.

    length: data.max_sequence_length, of the tokenizer that it is of; None: what that itself says.
    """
    from transformers import AutoTokenizer  # seconds

    index = teacher / "model_index.json"
    tree = read_json(index)
    try:
        names = sorted(name for name in tree if name.startswith(TOKENIZER) and tree[name][1])
    except (TypeError, IndexError) as error:
        raise ValueError(f"{index} is not that of a diffusers folder: {error}") from error
    # All sizes of a pipeline read their prompts alike.
    family = next((f for f in FAMILIES if f.pipeline_class == tree.get("_class_name")), None)
    readers = []
    for name in names:
        try:
            tokenizer = AutoTokenizer.from_pretrained(teacher / name, local_files_only=True)
        except (OSError, ValueError, RuntimeError, TypeError) as error:
            raise ValueError(
                f"the tokenizer in {teacher / name} cannot be read: {error}"
            ) from error
        # Where a tokenizer has no limit, its number is a very large one.
        limit, chat = min(int(tokenizer.model_max_length), 10**6), None
        if family and name == family.tokenizer:
            limit, chat = length or min(limit, family.longest_prompt), family.chat
        readers.append(Reader(name, limit, tokenizer, chat))
    return readers


def repeated(captions: list[str]) -> list[tuple[str, int]]:
    """Captions that stand more than once, with how often, the most frequent first."""
    counts = Counter(" ".join(caption.split()) for caption in captions if caption.strip())
    return [(caption, count) for caption, count in counts.most_common() if count > 1]


def caption_findings(
    captions: list[str],
    lengths: dict[str, list[int]],
    limits: dict[str, int],
    unread: Collection[int] = (),
) -> list[Finding]:
    """All that is to be said of the captions.

    lengths, limits: tokens of each caption, and how many are read, by tokenizer. unread: places of
    samples that are passed over, whose captions stand here as empty ones.
    """
    findings = []
    skipped = set(unread)
    empty = [i for i, caption in enumerate(captions) if not caption.strip() and i not in skipped]
    if empty:
        words = f"{share(len(empty), len(captions))} have an empty caption"
        findings.append(Finding("empty captions", "warning", words, [*empty]))
    if again := repeated(captions):
        more = sum(count for _, count in again)
        words = f"{share(more, len(captions))} share their caption with another"
        if len(again) == 1 and more == len(captions):
            words = "all captions are the same"
        findings.append(Finding("repeated captions", "note", words))
    for name, tokens in lengths.items():
        places = [i for i, length in enumerate(tokens) if length > limits[name]]
        places.sort(key=lambda i: -tokens[i])
        if places:
            words = (
                f"{share(len(places), len(captions))} have more than the {limits[name]} tokens "
                f"that {name} gives its encoder, up to {tokens[places[0]]}: the rest is not read"
            )
            reasons = [f"{tokens[i]} tokens" for i in places]
            findings.append(Finding(f"long captions, {name}", "warning", words, [*places], reasons))
    return findings


def caption_numbers(captions: list[str], lengths: dict[str, list[int]]) -> dict[str, Any]:
    """Counts and lengths, as plain values."""
    again = repeated(captions)
    return {
        "distinct": len(set(captions)),
        "words": percentiles(len(caption.split()) for caption in captions),
        "tokens": {name: percentiles(tokens) for name, tokens in lengths.items()},
        "most_frequent": [{"caption": c, "count": n} for c, n in again[:10]],
    }
