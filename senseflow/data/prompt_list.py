"""Prompts without images: lines of text, or rows of a table whose columns rewards may read.

Read as all commands read prompts (`senseflow.sampling.prompts`).
"""

import json
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

from torch.utils.data import Dataset

from senseflow.data.items import Item, Position
from senseflow.data.shared import Texts
from senseflow.sampling.prompts import read_prompts_file


class PromptList(Dataset[Item]):
    """The prompts of a file, each with the row it stands in.

    max_unreadable: rows of a cache that are passed over in a row, see `CachedSamples`.
    Raises ValueError, naming the file and the place in it, for what is no prompt.
    """

    def __init__(self, file: Path, max_unreadable: int = 100) -> None:
        self.file, self.max_unreadable = file, max_unreadable
        prompts = read_prompts_file(file)
        rows = [prompt.record or {} for prompt in prompts]
        self.prompts = Texts(prompt.text for prompt in prompts)
        self.rows = Texts(map(json.dumps, rows))
        self.has_fields = any(len(row) > 1 for row in rows)  # beside the prompt

    def fingerprint(self) -> str:
        """A digest of all rows."""
        return sha256(repr(([*self.prompts], [*self.rows])).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, position: Position) -> Item:
        return self.sample(position, position.item)

    def all_prompts(self) -> Iterator[str]:
        """The prompts of all samples, in their order."""
        return iter(self.prompts)

    def sample(self, position: Position, item: int) -> Item:
        """The data set's sample number `item` at a place of the run."""
        return Item(self.prompts[item], position.index, fields=json.loads(self.rows[item]))

    def source(self, item: int) -> str:
        """How a sample is called where it is passed over."""
        return f"{self.file}: prompt {item}"
