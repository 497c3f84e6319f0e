"""What one call is to draw: prompts, and the image and file of each; needs no torch."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Prompt:
    """One prompt and its number in the prompts file, which names its seed and file."""

    index: int
    text: str
    record: dict[str, Any] | None = None  # the whole entry of a file that says more than the text

    @property
    def id(self) -> Any:
        """What its file calls it, None when it says nothing."""
        return (self.record or {}).get("id")


@dataclass(frozen=True)
class Shot:
    """One image to draw: of which prompt, from which seed, to which files."""

    prompt: Prompt
    seed: int
    file: Path  # .png
    sidecar: Path  # .json: all that the image depends on


def prompt_shot(folder: Path, prompt: Prompt, seed: int) -> Shot:
    """The image of a prompt in a folder: `00007_a-red-fox.png`, number and words; seed + number."""
    words = re.sub(r"[\W_]+", "-", prompt.text.lower()).strip("-")[:50].strip("-")
    file = folder / f"{prompt.index:05d}_{words or 'image'}.png"
    return Shot(prompt, seed + prompt.index, file, file.with_suffix(".json"))


def shard_of(text: str | None) -> tuple[int, int]:
    """(i, n) of --shard i/n, else of torchrun's environment, else (0, 1)."""
    text = text or f"{os.environ.get('RANK', 0)}/{os.environ.get('WORLD_SIZE', 1)}"
    first, _, second = text.partition("/")
    if not (first.isdigit() and second.isdigit() and int(first) < int(second)):
        raise ValueError(f"--shard {text} is not I/N with 0 <= I < N")
    return int(first), int(second)
