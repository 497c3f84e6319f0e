"""AdamW's moments in 8 bits: a code per element and a scale per block (Dettmers et al., ICLR 2022).

The codes stand for the numbers of "dynamic tree quantization": decades from 1e-7 to 1, each with
twice as many numbers as the one below. They are chosen at random between the two neighbours of a
value, so that a moving average moves by its mean even where a step is far below the gap; rounded to
the nearest, a second moment with beta2 = 0.999 mostly stands still. The published codes end at 1
and at -0.993; these are symmetric, and the block's largest value has a code of its own.
"""

import torch
from torch import Tensor

from senseflow.common.devices import to_device

BLOCK = 64
"""Elements with one scale; they lie within one row of FLUX's, SD3.5's and SDXL's matrices."""
_DECADES = 7


def code_numbers(signed: bool, device: torch.device | None = None) -> Tensor:
    """What the codes stand for at scale 1, ascending, (255,) float32."""
    positive = []
    for decade in range(_DECADES):
        num = 2**decade * (1 if signed else 2)
        width = 0.9 / num  # of the parts of [0.1, 1), each of which stands for its middle
        middles = (0.1 + (i + 0.5) * width for i in range(num))
        positive += [10.0 ** (decade + 1 - _DECADES) * middle for middle in middles]
    negative = [-number for number in reversed(positive)] if signed else []
    numbers = torch.tensor([*negative, 0.0, *positive])
    return numbers if device is None else to_device(numbers, device)


def encode(x: Tensor, numbers: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (n,) uint8 and scales (n / BLOCK,) float32 of x, which they stand for in the mean.

    x: (n,) float32, finite, not negative unless the numbers are; numbers: of `code_numbers`; noise:
    (n,) int32 in [0, 2^16). A positive value below the smallest positive number takes that, never
    0, where 0 is the first number: a second moment of 0 would make the step infinite.
    """
    blocks = x.view(-1, BLOCK)
    # A block of zeros has no scale to divide by.
    scales = (blocks.abs().amax(1) / numbers[-1]).clamp_min(
        torch.finfo(torch.float32).smallest_normal
    )
    y = (blocks / scales[:, None]).view(-1).clamp(numbers[0], numbers[-1])
    lower = (torch.bucketize(y, numbers, right=True) - 1).clamp_(0, len(numbers) - 2)
    below, above = numbers[lower], numbers[lower + 1]
    # Up with a chance as large as the share of the gap that y is past the lower number.
    up = (y - below) * 2**16 > noise * (above - below)
    up |= (lower == 0) & (y > 0)
    return (lower + up).to(torch.uint8), scales


def decode(codes: Tensor, scales: Tensor, numbers: Tensor) -> Tensor:
    """What codes (n,) and scales (n / BLOCK,) stand for, (n,) float32."""
    return (numbers[codes.int()].view(-1, BLOCK) * scales[:, None]).view(-1)
