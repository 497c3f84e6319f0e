"""The layers of the discriminator's heads: local batch norm, spectral convolution, residual sum.

`senseflow.distill.vfm_heads` puts them together.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm, spectral_norm


class LocalBatchNorm(nn.Module):
    """Batch norm over virtual batches of the given number of samples, in train and eval alike.

    Statistics are always those of the samples at hand, so there are no running ones. A last
    virtual batch may be smaller. With 1 (instance norm) a sample's output depends on no other
    sample: ranks, batch sizes and accumulation all agree.
    """

    def __init__(self, width: int, virtual_batch: int = 1, eps: float = 1e-5) -> None:
        super().__init__()
        if virtual_batch < 1:
            raise ValueError(f"virtual_batch must be at least 1, got {virtual_batch}")
        self.virtual_batch = virtual_batch
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, C, H, W) of any dtype; statistics are taken in float32."""
        weight, bias = self.weight.float(), self.bias.float()
        # the operators, not those of F, which refuse a single 1x1 map; it becomes the bias
        rest = (weight, bias, None, None, True, 0.0, self.eps, torch.backends.cudnn.enabled)
        if self.virtual_batch == 1:
            return torch.instance_norm(x, *rest)
        return torch.cat([torch.batch_norm(group, *rest) for group in x.split(self.virtual_batch)])


class _Float32(nn.Module):
    """Weights in float32, whatever dtype FSDP gathered them in."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight.float()


class SpectralConv(nn.Conv2d):
    """Convolution of odd kernel size with spectral norm, circular padding and a bias.

    The norm is taken in float32 whatever the compute dtype: bfloat16 has too few digits for the
    power iteration. The convolution runs in the dtype of its input. The power iteration moves its
    buffers at each forward in train mode, and a forward in eval mode changes nothing. Not for use
    under autocast, which would override both dtypes.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, kernel, stride)
        self.margin = kernel // 2
        parametrize.register_parametrization(self, "weight", _Float32())
        spectral_norm(self)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, C, H, W); a stride of 2 halves the map, rounding up."""
        assert not torch.is_autocast_enabled()
        if self.margin:
            x = F.pad(x, [self.margin] * 4, mode="circular")
        assert self.bias is not None
        return F.conv2d(x, self.weight.to(x.dtype), self.bias.to(x.dtype), self.stride)


@contextmanager
def no_power_iterations() -> Iterator[None]:
    """Build without the 15 power iterations that start a spectral norm: on the meta device there
    are no numbers to iterate on, and the operations of all heads take seconds."""
    with patch.object(_SpectralNorm, "_power_method", lambda *_: None):
        yield


class Residual(nn.Module):
    """(x + block(x)) / sqrt 2, which keeps the variance of two equal and independent terms."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        """Add the block's output; shapes are kept."""
        both: Tensor = x + self.block(x)
        return both / math.sqrt(2)
