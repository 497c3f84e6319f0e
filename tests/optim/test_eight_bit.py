"""Moments in 8 bits: unbiased, exact where a code stands for the value, never 0 by rounding."""

import pytest
import torch

from senseflow.optim.eight_bit import BLOCK, code_numbers, decode, encode
from senseflow.optim.rounding import noise_of, random_words, word_of

NUMBERS = {signed: code_numbers(signed) for signed in (False, True)}


def noise(num: int, seed: int = 0) -> torch.Tensor:
    return noise_of(random_words(word_of(seed), torch.arange(num)), 0)


def test_the_numbers_are_those_of_dynamic_tree_quantization():
    """Dettmers et al.: decades of 1, 2, ... 64 (unsigned: 2 to 128) middles of equal parts."""
    codes = torch.arange(255).repeat_interleave(BLOCK).to(torch.uint8)
    for signed, smallest, num_top in ((True, 5.5e-7, 64), (False, 3.25e-7, 128)):
        numbers = decode(codes, torch.ones(255), NUMBERS[signed])[::BLOCK].double()
        positive = numbers[numbers > 0]
        assert positive[0] == pytest.approx(smallest) and len(positive) == (127 if signed else 254)
        top = positive[positive > 0.1]
        assert len(top) == num_top
        expected = 0.1 + 0.9 * (torch.arange(num_top).double() + 0.5) / num_top
        torch.testing.assert_close(top, expected, rtol=1e-6, atol=0)
        assert (numbers == 0).sum() == 1
        if signed:
            assert torch.equal(numbers, -numbers.flip(0))


@pytest.mark.parametrize("signed", [True, False])
def test_the_mean_over_all_noise_is_the_value(signed):
    x = torch.randn(BLOCK, generator=torch.Generator().manual_seed(1))
    x = x if signed else x.square()
    values = torch.arange(0, 2**16, 16).int()  # of the noise: to 1 / 4096 of a gap
    codes = encode(x.repeat(len(values)), NUMBERS[signed], values.repeat_interleave(BLOCK))
    mean = decode(*codes, NUMBERS[signed]).view(-1, BLOCK).double().mean(0)
    gap = 0.12 * x.abs() + 1e-7 * x.abs().max()  # of neighbours, at most
    assert ((mean - x).abs() <= gap / 2048 + 1e-6 * x.abs()).all()


@pytest.mark.parametrize("signed", [True, False])
def test_errors_stay_below_a_gap_and_the_largest_is_kept(signed):
    x = torch.randn(64 * BLOCK, generator=torch.Generator().manual_seed(2)) * 1e-7
    x = x if signed else x.square()
    codes, scales = encode(x, NUMBERS[signed], noise(len(x)))
    assert (codes.dtype, codes.shape, scales.shape) == (torch.uint8, x.shape, (64,))
    y = decode(codes, scales, NUMBERS[signed])
    largest = x.view(-1, BLOCK).abs().amax(1)
    torch.testing.assert_close(y.view(-1, BLOCK).abs().amax(1), largest, rtol=1e-6, atol=0)
    assert ((y - x).abs() <= 0.55 * x.abs() + 1e-6 * largest.repeat_interleave(BLOCK)).all()


def test_a_second_moment_is_never_rounded_to_zero():
    x = torch.full((BLOCK,), 1e-12)
    x[0] = 1.0
    x[1] = 0.0
    y = decode(*encode(x, NUMBERS[False], noise(BLOCK)), NUMBERS[False])
    assert y[1] == 0 and (y[2:] > 0).all()


def test_a_block_of_zeros_has_the_code_of_zero():
    for signed in (True, False):
        codes, _ = encode(torch.zeros(BLOCK), NUMBERS[signed], noise(BLOCK))
        assert not decode(codes, torch.ones(1), NUMBERS[signed]).any()


@pytest.mark.parametrize("value", [0.0, 1e-44, 1e-38, 3e38])
def test_blocks_of_any_size_stay_finite(value):
    for signed in (True, False):
        y = decode(
            *encode(torch.full((BLOCK,), value), NUMBERS[signed], noise(BLOCK)), NUMBERS[signed]
        )
        assert torch.isfinite(y).all()
        torch.testing.assert_close(y, torch.full((BLOCK,), value), rtol=1e-5, atol=1.2e-38)


def test_a_slow_average_arrives():
    """v <- 0.999 v + 0.001 s from 4 s: nearest codes stand still, these follow in the mean."""
    num, beta, target = 256 * BLOCK, 0.999, 1.0
    codes, scales = encode(torch.full((num,), 4.0), NUMBERS[False], noise(num))
    exact = 4.0
    for i in range(700):
        v = decode(codes, scales, NUMBERS[False])
        v[::BLOCK] = 30.0  # each block has a large one, which keeps the scale
        v[1:] = (beta * v + (1 - beta) * target)[1:]
        exact = beta * exact + (1 - beta) * target
        codes, scales = encode(v, NUMBERS[False], noise(num, i))
    v = decode(codes, scales, NUMBERS[False]).view(-1, BLOCK)[:, 1:]
    error = v.mean().item() - exact
    assert abs(error) < 5 * (v.std() / v.numel() ** 0.5).item()
    assert exact < 2.6 and v.std() < 0.35  # what rounding at random costs: the gap is 0.17
