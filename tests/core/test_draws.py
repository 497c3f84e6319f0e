"""Draws depend on seed, iteration, purpose and sample, and on nothing else."""

import itertools

import torch

from senseflow.core.draws import Draws, seed_of


def test_seed_is_pinned_across_versions():
    """A changed hash would silently change every run, so two values are written down."""
    assert seed_of(0, 1, "noise", 0) == 6672750071545812017
    assert seed_of(0, 1, "anchor", None) == 14442243724765968923


def test_every_argument_matters():
    seeds = [
        seed_of(seed, iteration, purpose, index)
        for seed, iteration, purpose, index in itertools.product(
            (0, 1, 11), (0, 1, 11), ("noise", "noise 1", "t"), (None, 0, 1, 11)
        )
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**64 for seed in seeds)


def test_a_sample_keeps_its_draws_in_any_company():
    whole = Draws(3, 7, tuple(range(6)))
    for split in ((0, 3, 6), (0, 1, 5, 6), (0, 6)):
        parts = [Draws(3, 7, tuple(range(a, b))) for a, b in itertools.pairwise(split)]
        noise = torch.cat([part.normal("noise", (4, 2, 2)) for part in parts])
        assert torch.equal(noise, whole.normal("noise", (4, 2, 2)))
        assert torch.equal(
            torch.cat([part.uniform("t", 3) for part in parts]), whole.uniform("t", 3)
        )


def test_a_stream_is_that_of_torchs_generator_at_its_seed():
    draws = Draws(3, 7, (5, 2))
    for shape in ((1,), (3, 5), (4, 8, 8)):
        generators = [torch.Generator().manual_seed(seed_of(3, 7, "noise", i)) for i in (5, 2)]
        expected = torch.stack([torch.randn(shape, generator=g) for g in generators])
        assert torch.equal(draws.normal("noise", shape), expected)
    generators = [torch.Generator().manual_seed(seed_of(3, 7, "t", i)) for i in (5, 2)]
    expected = torch.stack([torch.rand(3, generator=g) for g in generators])
    assert torch.equal(draws.uniform("t", 3), expected)


def test_shapes_and_types():
    draws = Draws(0, 1, (5, 2))
    assert draws.normal("noise", (3, 8)).shape == (2, 3, 8)
    assert draws.uniform("t").shape == (2, 1)
    assert draws.normal("noise", (1,)).dtype == draws.uniform("t").dtype == torch.float32
    assert draws.normal("noise", (1,)).device.type == "cpu"


def test_draws_do_not_touch_or_follow_the_global_generator():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = Draws(0, 1, (0,)).normal("noise", (4,))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(Draws(0, 1, (0,)).normal("noise", (4,)), first)


def test_shared_does_not_depend_on_the_samples():
    numbers = [
        torch.rand(4, generator=Draws(0, 2, indices).shared("anchor")) for indices in ((0,), (3, 4))
    ]
    assert torch.equal(*numbers)
    other = torch.rand(4, generator=Draws(0, 3, (0,)).shared("anchor"))
    assert not torch.equal(numbers[0], other)


def test_streams_are_independent_and_distributed_as_said():
    indices = tuple(range(2000))
    now, later = Draws(0, 1, indices), Draws(0, 2, indices)
    a, b, c = now.normal("noise", (8,)), now.normal("eps", (8,)), later.normal("noise", (8,))
    assert abs(a.mean()) < 0.03 and abs(a.std() - 1) < 0.03
    for x, y in ((a, b), (a, c), (a[:-1], a[1:])):
        assert abs((x * y).mean()) < 0.03  # 16000 products: standard error .008
    u = now.uniform("t", 8)
    assert u.min() >= 0 and u.max() < 1 and abs(u.mean() - 0.5) < 0.01
