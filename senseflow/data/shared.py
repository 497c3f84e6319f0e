"""Long lists that loading workers map in place of holding copies of their own.

A data set is sent to every worker that is spawned. torch sends a tensor by its shared memory: of
these lists all workers of a process read the one that it holds.
"""

from collections.abc import Iterable, Iterator
from itertools import pairwise

import numpy as np
import torch


class SharedArray:
    """A NumPy array (N,)."""

    def __init__(self, array: np.ndarray) -> None:
        self.dtype = array.dtype
        self.memory = torch.from_numpy(np.ascontiguousarray(array).view(np.uint8))

    @property
    def array(self) -> np.ndarray:
        """The array, not copied."""
        return self.memory.numpy().view(self.dtype)


class Texts:
    """A list of strings, of any characters."""

    def __init__(self, texts: Iterable[str]) -> None:
        encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
        ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        self.ends = SharedArray(ends)  # (N + 1,): text i is the bytes from ends[i] to ends[i + 1]
        self.bytes = SharedArray(np.frombuffer(bytearray(b"".join(encoded)), np.uint8))

    def __len__(self) -> int:
        return len(self.ends.array) - 1

    def __getitem__(self, place: int) -> str:
        start, end = self.ends.array[place : place + 2]
        return self._text(start, end)

    def __iter__(self) -> Iterator[str]:
        return (self._text(start, end) for start, end in pairwise(self.ends.array))

    def _text(self, start: int, end: int) -> str:
        return self.bytes.array[start:end].tobytes().decode("utf-8", "surrogatepass")
