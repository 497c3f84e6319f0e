"""Positions: every sample once per epoch, the same for any ranks, accumulation and resume."""

from itertools import islice

import pytest

from senseflow.data.json_images import JsonImages
from senseflow.data.sampler import MicroBatches, Share, batches, item_at
from senseflow.tiny.pictures import write_dataset


def share(**changes) -> Share:
    return Share(**{"seed": 5, "batch_size": 8, **changes})


def global_batches(num_iterations, world_size=1, accumulation=1, start=1, num=30):
    """Positions of each iteration, from all ranks and micro-batches together."""
    per_rank = []
    for rank in range(world_size):
        part = share(grad_accumulation=accumulation, rank=rank, world_size=world_size)
        sampler = MicroBatches(part, num, start)
        per_rank.append(list(islice(sampler, num_iterations * accumulation)))
    all_positions = [p for micros in per_rank for micro in micros for p in micro]
    return [
        sorted(p for p in all_positions if p.iteration == start + i) for i in range(num_iterations)
    ]


def test_every_sample_once_per_epoch_in_a_new_order():
    first, second = ([item_at(0, e * 30 + i, 30) for i in range(30)] for e in (0, 1))
    assert sorted(first) == sorted(second) == list(range(30)) and first != second
    assert first != [item_at(1, i, 30) for i in range(30)]


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_global_batch_does_not_depend_on_ranks_or_accumulation(world_size, accumulation):
    assert global_batches(9, world_size, accumulation) == global_batches(9)


def test_going_on_meets_the_same_batches():
    assert global_batches(5, start=5) == global_batches(9)[4:]


def test_a_rank_holds_contiguous_indices_per_micro_batch():
    sampler = MicroBatches(share(grad_accumulation=2, rank=1, world_size=2), 30, start=1)
    first, second = islice(sampler, 2)
    assert [p.index for p in first] == [4, 5] and [p.index for p in second] == [6, 7]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_carry_images_prompts_and_indices(tmp_path, num_workers):
    write_dataset(tmp_path, num=10, seed=0, num_prompts=2)
    data = JsonImages(tmp_path / "data.json", (32, 32))
    part = share(batch_size=4, grad_accumulation=2)
    iterations = batches(data, part, num_workers, pin_memory=False, start=3)
    micros = next(iterations)
    iterations.close()
    assert [m.indices for m in micros] == [[0, 1], [2, 3]]
    for micro in micros:
        assert micro.images.shape == (2, 3, 32, 32)
        for index, prompt in zip(micro.indices, micro.prompts, strict=True):
            assert prompt == data.prompts[item_at(5, 2 * 4 + index, 10)]
