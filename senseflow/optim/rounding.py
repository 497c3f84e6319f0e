"""Stochastic rounding to bfloat16, and the random bits it takes.

A bfloat16 has 8 significant bits: a change below 1/512 of a weight is lost in rounding to nearest,
every time. Rounded up or down at random, each with a chance that falls with its distance, it
arrives in the mean. The random bits are a function of a seed and of an element's own number, so
that they depend neither on the device, nor on how a tensor is split, nor on what was drawn before.
"""

import torch
from torch import Tensor

_GAMMA, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def word_of(seed: int, device: torch.device | None = None) -> Tensor:
    """The 64 low bits of a seed, 0-d int64: on the device, because what is compiled takes every
    number for a constant."""
    return torch.full((), _signed(seed), dtype=torch.int64, device=device)


def random_words(seed: Tensor, counters: Tensor) -> Tensor:
    """64 random bits for each counter, int64 of the same shape: SplitMix64 begun at `seed`.

    seed: of `word_of`; counters: int64. The n-th output of the generator of Steele, Lea and Flood
    ("Fast splittable pseudorandom number generators", 2014) for the counter n, in integers that
    wrap around at 2^64.
    """
    z = (counters * _signed(_GAMMA)).add_(seed)
    z.bitwise_xor_(_shifted(z, 30)).mul_(_signed(_MIX_1))
    z.bitwise_xor_(_shifted(z, 27)).mul_(_signed(_MIX_2))
    return z.bitwise_xor_(_shifted(z, 31))


def noise_of(words: Tensor, part: int) -> Tensor:
    """The part-th (0 to 3) 16 bits of random words, int32 in [0, 2^16)."""
    return _shifted(words, 16 * part).bitwise_and_(0xFFFF).to(torch.int32)


def round_stochastically(x: Tensor, noise: Tensor) -> Tensor:
    """x as bfloat16, rounded to one of its two neighbours, which in the mean over noise is x.

    x: float32; noise: int32 in [0, 2^16), of the same shape. The neighbour away from zero is taken
    where the noise exceeds what is missing to it, in 2^-16 of the gap between the two: of the 2^16
    values of the noise, just as many as x is far from the other one. What bfloat16 represents stays
    as it is, infinite values and NaN too; above its largest number x may become infinite, as it
    does in rounding to nearest.
    """
    # What is added below the 16 bits that are cut carries into those that stay.
    bits = (x.view(torch.int32) + noise).bitwise_and_(-(1 << 16))  # sign and magnitude: truncated
    return torch.where(torch.isfinite(x), bits.view(torch.float32), x).to(torch.bfloat16)


def _shifted(words: Tensor, places: int) -> Tensor:
    """To the right, zeros coming in: int64's own shift repeats the sign."""
    return (words >> places).bitwise_and_((1 << (64 - places)) - 1) if places else words.clone()


def _signed(word: int) -> int:
    """The 64 low bits of a word as a signed number, the only kind that torch takes."""
    word &= (1 << 64) - 1
    return word - (1 << 64) if word >> 63 else word
