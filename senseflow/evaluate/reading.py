"""Images from files to batches: threads decode and preprocess while the model works."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from senseflow.evaluate.folders import Picture, open_rgb

Load = Callable[[Image.Image], Tensor]
AHEAD = 2  # batches in the making


@dataclass(frozen=True)
class Reader:
    """How many images at a time, and how many threads prepare them."""

    batch_size: int
    threads: int

    def batches(
        self, pictures: Sequence[Picture], load: Load
    ) -> Iterator[tuple[Sequence[Picture], Tensor]]:
        """Batches of `batch_size`, in order."""
        starts = range(0, len(pictures), self.batch_size)
        return self.groups([pictures[i : i + self.batch_size] for i in starts], load)

    def groups(
        self, groups: Sequence[Sequence[Picture]], load: Load
    ) -> Iterator[tuple[Sequence[Picture], Tensor]]:
        """Each group and its images (B, ...), in order.

        Raises ValueError naming the file of an image that cannot be read or used.
        """
        pool = ThreadPoolExecutor(self.threads)
        waiting: deque[tuple[Sequence[Picture], list[Future[Tensor]]]] = deque()
        try:
            for group in groups:
                waiting.append((group, [pool.submit(read, p, load) for p in group]))
                if len(waiting) > AHEAD:
                    yield _finish(*waiting.popleft())
            while waiting:
                yield _finish(*waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)


def read(picture: Picture, load: Load) -> Tensor:
    """One image, decoded and preprocessed; raises ValueError naming its file."""
    decoded = open_rgb(picture.file)
    try:
        return load(decoded)
    except ValueError as error:
        raise ValueError(f"{picture.file}: {error}") from error


def _finish(
    group: Sequence[Picture], futures: list[Future[Tensor]]
) -> tuple[Sequence[Picture], Tensor]:
    tensors = [future.result() for future in futures]
    for picture, tensor in zip(group, tensors, strict=True):
        if tensor.shape != tensors[0].shape:
            sizes = (list(t.shape[1:]) for t in (tensor, tensors[0]))
            raise ValueError(
                f"{picture.file} and {group[0].file} are of different sizes after preprocessing, "
                f"{' and '.join(map(str, sizes))}: name one in place of 0"
            )
    return group, torch.stack(tensors)
