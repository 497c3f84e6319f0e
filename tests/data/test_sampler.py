"""Positions: every sample once per epoch, the same for any ranks, accumulation and resume."""

from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from senseflow.data.items import Position
from senseflow.data.json_images import JsonImages
from senseflow.data.sampler import Batch, MicroBatches, Share, batches, item_at
from senseflow.tiny.pictures import write_dataset


def share(**changes) -> Share:
    return Share(**{"seed": 5, "batch_size": 8, **changes})


def global_batches(num_iterations, world_size=1, accumulation=1, start=1, num=30, **changes):
    """Positions of each iteration, from all ranks and micro-batches together."""
    per_rank = []
    for rank in range(world_size):
        part = share(grad_accumulation=accumulation, rank=rank, world_size=world_size, **changes)
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


@pytest.mark.parametrize("world_size", [1, 4])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_separate_real_samples_do_not_depend_on_ranks_or_accumulation(world_size, accumulation):
    whole = global_batches(9, separate_real=True)
    assert global_batches(9, world_size, accumulation, separate_real=True) == whole
    assert global_batches(5, world_size, accumulation, start=5, separate_real=True) == whole[4:]
    assert [[p for p in batch if not p.separate] for batch in whole] == global_batches(9)


def test_both_draws_visit_every_sample_once_per_epoch_and_know_nothing_of_each_other():
    num, epochs = 64, 40
    positions = [p for b in global_batches(8 * epochs, num=num, separate_real=True) for p in b]
    draws = []
    for separate in (False, True):
        items = [p.item for p in sorted(positions) if p.separate == separate]
        rounds = [items[i * num : (i + 1) * num] for i in range(epochs)]
        assert all(sorted(order) == list(range(num)) for order in rounds)
        draws.append(items)
    pairs = list(zip(*draws, strict=True))
    assert 15 < sum(a == b for a, b in pairs) < 75  # 40 expected, one per epoch
    assert len(set(pairs)) > 1700  # of the 4,096 there are; 1,904 expected
    correlation = torch.corrcoef(torch.tensor(draws, dtype=torch.float))[0, 1]
    assert abs(correlation) < 0.08  # four deviations of 2,560 pairs


def test_a_batch_without_a_second_draw_is_its_own_real_samples():
    batch = Batch(prompts=["a"], indices=[0], images=torch.zeros(1, 3, 1, 1))
    assert batch.real is batch and batch.latents is None
    other = Batch(prompts=["b"], indices=[0], images=torch.ones(1, 3, 1, 1))
    assert replace(batch, other=other).real is other


def test_pinning_a_batch_pins_all_its_tensors(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 1)  # no GPU needed
    other = Batch(prompts=["b"], indices=[0], latents=torch.zeros(1, 4, 1, 1))
    batch = Batch(prompts=["a"], indices=[0], images=torch.zeros(1, 3, 1, 1), other=other)
    pinned = batch.pin_memory()
    assert (pinned.images == 1).all() and pinned.latents is None
    assert (pinned.real.latents == 1).all() and pinned.real.images is pinned.real.other is None


def test_separate_real_samples_come_beside_the_prompts_own(tmp_path):
    write_dataset(tmp_path, num=10, seed=0, num_prompts=2)
    data = JsonImages(tmp_path / "data.json", (32, 32))
    part = share(batch_size=4, grad_accumulation=2, separate_real=True)
    iterations = batches(data, part, 0, pin_memory=False, start=3)
    micros = next(iterations)
    iterations.close()
    for micro in micros:
        real = micro.real
        assert real is micro.other and real.indices == micro.indices
        for k, index in enumerate(micro.indices):
            own, other = (item_at(5, 2 * 4 + index, 10, separate) for separate in (False, True))
            assert micro.prompts[k] == data.prompts[own]
            assert real.prompts[k] == data.prompts[other]
            expected = data[Position(3, index, other, separate=True)].image
            assert torch.equal(real.images[k], expected)


def test_unreadable_samples_of_both_draws_are_told_together(tmp_path):
    write_dataset(tmp_path, num=4, seed=0, num_prompts=2)
    (tmp_path / "images" / "000002.png").write_bytes(b"")
    data = JsonImages(tmp_path / "data.json", (32, 32))
    micros = next(batches(data, share(batch_size=4, separate_real=True), 0, False, start=1))
    assert [Path(path).name for path, _ in micros[0].unreadable] == ["000002.png"] * 2


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
        assert micro.images.shape == (2, 3, 32, 32) and micro.latents is micro.other is None
        for index, prompt in zip(micro.indices, micro.prompts, strict=True):
            assert prompt == data.prompts[item_at(5, 2 * 4 + index, 10)]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_samples_of_a_group_are_one_in_iterations_for_rewards(world_size):
    """Every third iteration is of two groups of four, whichever ranks hold them."""
    grouped = dict(group_size=4, group_every=3)
    found, plain = global_batches(6, world_size, **grouped), global_batches(6)
    for iteration, (batch, usual) in enumerate(zip(found, plain, strict=True), 1):
        items = [p.item for p in usual]
        if iteration % 3 == 0:
            items = [items[0]] * 4 + [items[4]] * 4
        assert [p.item for p in batch] == items
        assert [p.index for p in batch] == list(range(8))
    separate = [p for batch in global_batches(6, separate_real=True) for p in batch if p.separate]
    both = [p for batch in global_batches(6, separate_real=True, **grouped) for p in batch]
    assert [p for p in both if p.separate] == separate
