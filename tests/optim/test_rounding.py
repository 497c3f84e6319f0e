"""Stochastic rounding by enumeration of all its noise, and its bits against the published ones."""

import pytest
import torch
from scipy.stats import chisquare

from senseflow.optim.rounding import noise_of, random_words, round_stochastically, word_of

NOISE = torch.arange(2**16, dtype=torch.int32)
LARGEST = torch.finfo(torch.bfloat16).max


def every_rounding(value: float) -> torch.Tensor:
    return round_stochastically(torch.full((2**16,), value), NOISE)


@pytest.mark.parametrize("value", [1.0 + 2**-9, 3.14159274, -0.7310585, 1e-6, -6.1e33, 1e-39])
def test_the_mean_over_all_noise_is_the_value_itself(value):
    """And it is one of the two neighbours: their gap is that of 8 significant bits."""
    x = torch.tensor(value).double()  # of the float32, exactly
    rounded = every_rounding(value)
    assert rounded.dtype == torch.bfloat16 and len(rounded.unique()) == 2
    assert rounded.double().mean() == x
    low, high = rounded.double().unique()
    chance = (rounded.double() == high).double().mean()
    assert chance == (x - low) / (high - low)
    assert high == torch.nextafter(low.bfloat16(), torch.tensor(torch.inf).bfloat16())


def test_what_is_representable_stays():
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)  # every bfloat16 there is
    values = bits.view(torch.bfloat16)
    for noise in (0, 1, 40000, 2**16 - 1):
        rounded = round_stochastically(values.float(), torch.full((2**16,), noise).int())
        nan = values.isnan()
        assert (
            torch.equal(rounded[~nan].view(torch.int16), bits[~nan]) and rounded[nan].isnan().all()
        )


@pytest.mark.parametrize("bits", [0x7F800001, 0x7FFFFFFF, -1])
def test_every_kind_of_nan_stays_one(bits):
    x = torch.tensor([bits], dtype=torch.int64).to(torch.int32).view(torch.float32)
    for noise in (0, 2**16 - 1):
        assert round_stochastically(x, torch.tensor([noise], dtype=torch.int32)).isnan().all()


def test_a_finite_value_beyond_the_largest_becomes_it_or_infinite():
    assert set(every_rounding(3.4e38).tolist()) == {LARGEST, float("inf")}


def test_the_bits_are_splitmix64s():
    """Its first outputs for the seed 1234567, as published with its reference code."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    words = random_words(word_of(1234567), torch.arange(1, 4))
    assert [word % 2**64 for word in words.tolist()] == published


def test_a_negative_and_a_large_seed_are_taken():
    one, other = (random_words(word_of(seed), torch.arange(4)) for seed in (2**64 - 1, -1))
    assert torch.equal(one, other)


@pytest.mark.parametrize("part", range(4))
def test_noise_is_uniform_and_its_neighbours_are_independent(part):
    """Chi-square on 256 cells of (this one, the next), at a chance of 1e-4 for a false alarm."""
    noise = noise_of(random_words(word_of(3), torch.arange(400_001)), part)
    assert noise.dtype == torch.int32 and noise.min() >= 0 and noise.max() < 2**16
    high = noise >> 12
    cells = torch.bincount(high[:-1] * 16 + high[1:], minlength=256)
    assert chisquare(cells.numpy()).pvalue > 1e-4
    low = torch.bincount(noise & 255, minlength=256)
    assert chisquare(low.numpy()).pvalue > 1e-4


def test_parts_and_seeds_are_unlike():
    counters = torch.arange(100_000)
    streams = [
        noise_of(random_words(word_of(seed), counters), part)
        for seed in (5, 6)
        for part in range(4)
    ]
    table = torch.stack(streams).double()
    off = torch.corrcoef(table) - torch.eye(len(streams))
    assert off.abs().max() < 5 / 100_000**0.5
