"""The heads h of SenseFlow's discriminator D(x, c, r) = h(f_VFM(x), c, r) (Eq. 15), one per tap.

They are all that the discriminator trains, on the frozen features of
`senseflow.distill.vfm_features`, and end at the logits: losses are in `senseflow.core.adversarial`.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Size, Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm, spectral_norm

from senseflow.core.names import NormSchedule, TextLayer
from senseflow.weights.meta import seeded

COMMON_DIM = 64
"""Channels in which class map, text and reference meet; the logit is their product's sum."""


@dataclass(frozen=True)
class Layers:
    """What the layers of a head are, where `adversarial` of a configuration lets choose."""

    virtual_batch: int = 1  # samples that share the statistics of a norm
    text: TextLayer = "equalized"  # of the prompt's feature: `EqualizedLinear`, or a plain one
    spectral_norm: NormSchedule = "converged"  # release: `_ReleasedNorm`
    width: int | None = None  # channels of a trunk's maps; None: as many as the features have


class LocalBatchNorm(nn.Module):
    """Batch norm over virtual batches of the given number of samples, in train and eval alike.

    Statistics are always those of the samples at hand, so there are no running ones. A last
    virtual batch may be smaller. With 1 (instance norm) a sample's output depends on no other
    sample: ranks, batch sizes and accumulation all agree.
    """

    def __init__(self, width: int, virtual_batch: int = 1) -> None:
        super().__init__()
        if virtual_batch < 1:
            raise ValueError(f"virtual_batch must be at least 1, got {virtual_batch}")
        self.virtual_batch = virtual_batch
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, C, H, W) of any dtype; statistics are taken in float32."""
        weight, bias = self.weight.float(), self.bias.float()
        # the operators, not those of F, which refuse a single 1x1 map; it becomes the bias
        rest = (weight, bias, None, None, True, 0.0, 1e-5, torch.backends.cudnn.enabled)
        if self.virtual_batch == 1:
            return torch.instance_norm(x, *rest)
        return torch.cat([torch.batch_norm(group, *rest) for group in x.split(self.virtual_batch)])


class _Float32(nn.Module):
    """Weights in float32, whatever dtype FSDP gathered them in."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight.float()


class _ReleasedNorm(_SpectralNorm):
    """Spectral norm on the schedule of the released code.

    Three power iterations where torch's has one, each v before u, and none at the start, where
    torch's has 15: the vectors begin random.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight, n_power_iterations=3)

    @torch.no_grad()
    def _power_method(self, weight_mat: Tensor, n_power_iterations: int) -> None:
        if n_power_iterations != self.n_power_iterations:
            return  # the 15 at the start
        for _ in range(n_power_iterations):
            # in place, as torch's: the buffers stay those that a checkpoint knows
            F.normalize(weight_mat.mH @ self._u, dim=0, eps=self.eps, out=self._v)
            F.normalize(weight_mat @ self._v, dim=0, eps=self.eps, out=self._u)


class SpectralConv(nn.Conv2d):
    """Convolution of odd kernel size with spectral norm, circular padding and a bias.

    The norm is taken in float32 whatever the compute dtype: bfloat16 has too few digits for the
    power iteration. The convolution runs in the dtype of its input. The power iteration moves its
    buffers at each forward in train mode, and a forward in eval mode changes nothing. Not for use
    under autocast, which would override both dtypes.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        stride: int = 1,
        schedule: NormSchedule = "converged",
    ) -> None:
        super().__init__(in_channels, out_channels, kernel, stride)
        self.margin = kernel // 2
        # First, so that the norm is taken of float32 weights.
        parametrize.register_parametrization(self, "weight", _Float32())
        if schedule == "release":
            # unsafe: torch's check is a forward in train mode, three iterations
            norm = _ReleasedNorm(self.weight)
            parametrize.register_parametrization(self, "weight", norm, unsafe=True)
        else:
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


class _Scaled(nn.Module):
    """Weights times a constant, in float32 whatever dtype FSDP gathered them in."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, weight: Tensor) -> Tensor:
        return weight.float() * self.scale


class EqualizedLinear(nn.Linear):
    """A linear layer at an equalized learning rate (Karras et al. 2018, section 4.1).

    The stored weights start from N(0, 1), the bias from 0, and the forward scales the weights by
    1 / sqrt(in_features). A step of Adam, whose length knows nothing of a gradient's scale, then
    moves what acts by lr / sqrt(in_features), where it would move a plain layer's weights by lr.
    In a state dict it is `parametrizations.weight.original`, where a plain layer has `weight`.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        scale = _Scaled(1 / math.sqrt(in_features))
        parametrize.register_parametrization(self, "weight", scale)

    def reset_parameters(self) -> None:
        """Draw the stored weights; torch asks for it before they are scaled."""
        nn.init.normal_(self.weight)
        nn.init.zeros_(self.bias)


def text_layer_of(keys: Iterable[str]) -> TextLayer | None:
    """Which text layer heads have whose state dict has these keys; None where they are none."""
    kinds: dict[str, TextLayer] = {
        "heads.0.text.weight": "linear",
        "heads.0.text.parametrizations.weight.original": "equalized",
    }
    return next((kinds[key] for key in keys if key in kinds), None)


def widths_of(shapes: Mapping[str, Size]) -> tuple[int, int] | None:
    """The channels of the maps, and of the features, of heads whose state dict has these shapes;
    None where they are none."""
    first = shapes.get("heads.0.class_map.0.0.parametrizations.weight.original")
    return (first[0], first[1]) if first else None


def _activated(in_channels: int, width: int, kernel: int, layers: Layers) -> nn.Sequential:
    """Spectral convolution - local batch norm - leaky ReLU."""
    return nn.Sequential(
        SpectralConv(in_channels, width, kernel, schedule=layers.spectral_norm),
        LocalBatchNorm(width, layers.virtual_batch),
        nn.LeakyReLU(0.2, inplace=True),
    )


def _common_map(in_channels: int, layers: Layers) -> nn.Sequential:
    """The trunk, ending at an eighth of the map's size, then 1x1 to COMMON_DIM.

    The strided convolutions stand bare: every activation is in the first layer and the residual
    blocks. On small inputs the last map is 1x1, where a norm over one sample would erase it.
    """
    width = layers.width or in_channels
    conv = partial(SpectralConv, schedule=layers.spectral_norm)
    return nn.Sequential(
        _activated(in_channels, width, 1, layers),
        conv(width, width, 3, stride=2),
        Residual(_activated(width, width, 3, layers)),
        conv(width, width, 3, stride=2),
        Residual(_activated(width, width, 3, layers)),
        conv(width, width, 3, stride=2),
        conv(width, COMMON_DIM, 1),
    )


class Head(nn.Module):
    """The discriminator of one tap: class map times condition, condition = text + reference.

    width: channels of the backbone's features. text_dim: length of the prompt's. reference: whether
    a second trunk reads the features of a reference image. layers: what they are.
    """

    def __init__(
        self, width: int, text_dim: int, reference: bool, layers: Layers | None = None
    ) -> None:
        super().__init__()
        layers = layers or Layers()
        self.virtual_batch = layers.virtual_batch
        self.class_map = _common_map(width, layers)
        linear = EqualizedLinear if layers.text == "equalized" else nn.Linear
        self.text = linear(text_dim, COMMON_DIM)
        self.reference = _common_map(width, layers) if reference else None

    def forward(self, features: Tensor, text: Tensor, reference: Tensor | None) -> Tensor:
        """Judge every place of a map: logits (B, L) float32, L = ceil(h / 8) ceil(w / 8).

        features: (B, width, h, w). text: (b, text_dim), b dividing B: conditions are repeated, so
        that [real, fake] of the same prompts run the reference's trunk once. reference:
        (b, width, h, w) if the head was built with one, otherwise None. Raises ValueError where it
        is missing or superfluous, and where b does not divide B.
        """
        if (reference is None) != (self.reference is None):
            raise ValueError("pass a reference exactly where the head is built with one")
        if features.shape[0] % text.shape[0]:
            raise ValueError(f"{text.shape[0]} conditions do not divide {features.shape[0]} images")
        # (b, COMMON_DIM, 1, 1), in float32 under FSDP's bfloat16 parameters too
        condition = F.linear(text.float(), self.text.weight.float(), self.text.bias.float())
        condition = condition[:, :, None, None]
        if reference is not None and self.reference is not None:
            condition = condition + self.reference(reference).float()
        condition = condition.repeat(features.shape[0] // text.shape[0], 1, 1, 1)
        class_map = self._class_map(features, len(text)).float()  # (B, COMMON_DIM, h/8, w/8)
        # A sum of 64 products of unit variance deviates by sqrt(64).
        product = class_map * condition
        return product.sum(1).flatten(1) / math.sqrt(COMMON_DIM)

    def _class_map(self, features: Tensor, num: int) -> Tensor:
        """The class map; virtual batches never mix real and fake, which come `num` at a time."""
        if self.virtual_batch == 1:
            whole: Tensor = self.class_map(features)
            return whole
        with parametrize.cached():  # one spectral norm, so one power iteration, for all parts
            return torch.cat([self.class_map(part) for part in features.split(num)])


class Heads(nn.Module):
    """One head per tap: all that the discriminator trains.

    Eight heads of width 1024 with text features of 768 and a reference hold 773,391,872
    parameters (386,892,800 without a reference): shard them, one unit per head.

    The mode matters to spectral norm alone: each forward in train mode is one power iteration. The
    heads stay in eval mode, so that the generator's turn leaves no trace, and `power_iteration`
    moves the norms where the heads themselves are stepped; for results that do not depend on
    accumulation, with the first micro-batch of a step only.

    width, text_dim, reference, layers: of each `Head`. seed: of the initial weights, so that all
    ranks start from the same heads; the global generator is left as it was. Build on the CPU or the
    meta device; `draw` makes the heads with their weights again, one after the other, to fill those
    of the meta device. dtype: of the convolutions; the features are cast to it. Weights stay
    float32.
    """

    def __init__(
        self,
        num_taps: int,
        width: int,
        text_dim: int,
        reference: bool = True,
        layers: Layers | None = None,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.dtype = dtype
        make = partial(Head, width, text_dim, reference, layers)
        self.draw = partial(seeded, seed, [make] * num_taps)
        self.heads = nn.ModuleList(self.draw())
        self.norms = [module for module in self.modules() if isinstance(module, _SpectralNorm)]

    @contextmanager
    def power_iteration(self, moving: bool = True) -> Iterator[None]:
        """Let the norms move in a forward, or not; the other 700 modules are not walked through."""
        for norm in self.norms:
            norm.training = moving
        try:
            yield
        finally:
            for norm in self.norms:
                norm.training = False

    def forward(
        self,
        features: list[Tensor],
        text: Tensor,
        references: list[Tensor] | None,
        first: int = 0,
    ) -> Tensor:
        """The logits of as many heads as there are maps, shallow to deep: (B, sum of L), float32.

        features, references: a map (B, width, h, w) and (b, width, h, w) per head, as
        `FrozenBackbone` returns them, b dividing B; references are None for heads built without.
        text: (b, text_dim). first: the number of the first of these heads.
        """
        features = [maps.to(self.dtype) for maps in features]
        references = references and [maps.to(self.dtype) for maps in references]
        per_head: Sequence[Tensor | None] = references or [None] * len(features)
        heads = [*self.heads][first : first + len(features)]
        return torch.cat(
            [
                head(maps, text, reference)
                for head, maps, reference in zip(heads, features, per_head, strict=True)
            ],
            dim=1,
        )
