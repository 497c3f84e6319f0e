"""Small groups of gloo ranks for tests that need no whole run."""

import tempfile
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def on_ranks(world_size: int, check: Callable[..., None], *args: object) -> None:
    """Call `check(rank, *args)` in as many processes; an error in one is an error here."""
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{folder}/store"
        mp.spawn(_worker, (world_size, store, check, args), nprocs=world_size)


def _worker(
    rank: int, world_size: int, store: str, check: Callable[..., None], args: tuple[object, ...]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    try:
        check(rank, *args)
    finally:
        dist.destroy_process_group()
