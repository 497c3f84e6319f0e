"""Encoded prompts of every kind: with and without a pooled vector and a mask."""

import pytest
import torch

from senseflow.teachers.encoded import Conditioning, Encoded, Posterior


def prompts(num: int, start: int, pooled: bool, mask: bool) -> Conditioning:
    """Numbers that tell every sample, token and channel apart."""
    embeds = torch.arange(start, start + num * 6.0).view(num, 3, 2)
    seen = torch.arange(3) <= torch.arange(start, start + num)[:, None] % 3
    return Conditioning(embeds, embeds.sum(1) if pooled else None, seen if mask else None)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("pooled", [False, True])
def test_batches_are_put_together_sample_by_sample(pooled, mask):
    one, two = prompts(1, 0, pooled, mask), prompts(2, 7, pooled, mask)
    both = one.cat(two)
    assert (len(one), len(two), len(both)) == (1, 2, 3)
    assert both.tensors.keys() == one.tensors.keys()
    assert ("pooled" in both.tensors, "mask" in both.tensors) == (pooled, mask)
    for name, tensor in both.tensors.items():
        assert torch.equal(tensor[0], one.tensors[name][0])
        assert torch.equal(tensor[1:], two.tensors[name])
        assert tensor.dtype == (torch.bool if name == "mask" else torch.float32)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("pooled", [False, True])
def test_one_prompt_stands_for_many(pooled, mask):
    one = prompts(1, 4, pooled, mask)
    many = one.expand(3)
    assert len(many) == 3
    for name, tensor in one.tensors.items():
        assert all(torch.equal(row, tensor[0]) for row in many.tensors[name])


def test_samples_of_a_cache_become_a_batch():
    posterior = [Posterior(torch.full((1, 2, 1, 1), i), torch.ones(1, 2, 1, 1)) for i in (1.0, 2.0)]
    samples = [
        Encoded(prompts(1, i, pooled=False, mask=True), torch.ones(1, 4), one)
        for i, one in enumerate(posterior)
    ]
    batch = Encoded.stack(samples).map(lambda tensor: tensor.to(torch.float64))
    assert batch.cond and batch.posterior and batch.text is not None
    assert batch.cond.pooled is None and batch.cond.mask is not None
    assert batch.cond.mask.tolist() == [[True, False, False], [True, True, False]]
    assert batch.posterior.mean[:, 0, 0, 0].tolist() == [1, 2] and batch.text.shape == (2, 4)
