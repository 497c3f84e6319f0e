"""The names of a family's tensors in its authors' own files. Light: names, no tensors.

A file of the authors holds some of diffusers' tensors in one: `senseflow.weights.original` finds
which rows of it each of them is.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Rules = tuple[tuple[str, str], ...]  # regular expressions and what is put in their place, in turn


@dataclass(frozen=True)
class OriginalNames:
    """How the authors' files name a network's tensors."""

    title: str  # whose names they are
    mark: str | None  # how some name begins, and none of another family's; None: as in diffusers
    prefix: str  # before every name in the file that they publish
    name: Callable[[str, dict[str, Any]], str]  # by diffusers' name and the network's config
    # How XLabs' LoRA files name a layer of diffusers', and which third of theirs it is, None: all.
    adapter: Callable[[str], tuple[str, int | None] | None] = lambda layer: None


def renamed(key: str, rules: Rules) -> str:
    """A name after all rules, each on what the one before it left."""
    for pattern, put in rules:
        key = re.sub(pattern, put, key)
    return key
