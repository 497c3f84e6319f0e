"""Frozen linear layers in 4 or 8 bits: packed while they are read, unpacked for each product.

nf4 is QLoRA's (Dettmers et al. 2023, arXiv 2305.14314) by bitsandbytes' own operations: 4 bits for
an element, a float32 scale for 64 of them, no second quantization. int8 is the nearest whole number
from -127 to 127, with a float32 scale for a row. A row is packed by itself, so that the bytes are
the same on any number of ranks. Products are those of plain linear layers with unpacked weights.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Size, Tensor, nn

from senseflow.core.names import BaseForm
from senseflow.weights.meta import NetworkSource
from senseflow.weights.stored import Computed, Stored, Weights

BLOCK = 64
"""Elements of a row with one scale in nf4, as in diffusers' and transformers' QLoRA."""
AT_ONCE = 2**22  # elements: packing takes about 20 bytes for each
FIRST_TORCH = (2, 12)  # whose FSDP2 shards parameters of bytes
HALVES = ("codes", "scales")


def pack(weight: Tensor, form: BaseForm) -> tuple[Tensor, Tensor]:
    """Codes and scales of rows (r, n), both bytes, on their device.

    Codes are (r, n / 2) in nf4 and (r, n) in int8, scales the bytes of float32, (r, 4 n / 64) and
    (r, 4). Bytes, because FSDP2 gathers what is of a floating type in that of the computation.
    """
    load_library(form)
    rows, columns = weight.shape
    num = max(1, AT_ONCE // columns)
    parts = [_packed(weight[i : i + num].float(), form) for i in range(0, rows, num)]
    codes, scales = (
        torch.cat([part[half] for part in parts] or [torch.empty(0, dtype=torch.uint8)])
        for half in (0, 1)
    )
    sizes = halves_of(rows, columns, form)
    return codes.view(sizes["codes"]), scales.view(sizes["scales"])


def _packed(rows: Tensor, form: BaseForm) -> tuple[Tensor, Tensor]:
    """Codes and scales of some float32 rows, flat."""
    if form == "nf4":
        codes, scales = torch.ops.bitsandbytes.quantize_4bit(rows, BLOCK, "nf4", torch.uint8)
    else:
        scales = rows.abs().amax(1) / 127
        # A row of zeros has no scale to divide by.
        codes = (
            rows / scales.clamp_min(torch.finfo(torch.float32).smallest_normal)[:, None]
        ).round()
        codes = codes.to(torch.int8)
    return codes.view(torch.uint8).view(-1), scales.contiguous().view(torch.uint8).view(-1)


def unpack(codes: Tensor, scales: Tensor, form: BaseForm, dtype: torch.dtype) -> Tensor:
    """What codes and scales, (..., r, n) or as wide as `pack` makes them, stand for: products in
    float32, rounded once to `dtype`."""
    numbers = scales.view(torch.float32)
    if form == "int8":
        return (codes.view(torch.int8) * numbers).to(dtype)
    shape = [*codes.shape[:-1], 2 * codes.shape[-1]]
    unpacked: Tensor = torch.ops.bitsandbytes.dequantize_4bit(
        codes, numbers.view(-1), BLOCK, "nf4", shape, dtype
    )
    return unpacked


def halves_of(rows: int, columns: int, form: BaseForm) -> dict[str, Size]:
    """The shapes of codes and scales."""
    if form == "nf4":
        return {"codes": Size((rows, columns // 2)), "scales": Size((rows, 4 * columns // BLOCK))}
    return {"codes": Size((rows, columns)), "scales": Size((rows, 4))}


class _Product(torch.autograd.Function):
    """x W^T + b, keeping W's bytes alone for the way back to x; W and b are frozen."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, form: BaseForm
    ) -> Tensor:
        ctx.save_for_backward(codes, scales)
        ctx.form = form
        return F.linear(x, unpack(codes, scales, form, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        # As one matrix of one: torch.compile joins equal operations of both ways, and would keep
        # the forward's unpacked weight until now.
        codes, scales = (saved[None] for saved in ctx.saved_tensors)
        gradient = gradients[0]
        return gradient @ unpack(codes, scales, ctx.form, gradient.dtype)[0], *[None] * 4


class PackedLinear(nn.Module):
    """A frozen linear layer on the meta device, whose weight will be in few bits."""

    def __init__(self, layer: nn.Linear, form: BaseForm) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.form: BaseForm = form
        self.codes: nn.Parameter
        self.scales: nn.Parameter
        for name, shape in halves_of(layer.out_features, layer.in_features, form).items():
            half = torch.empty(shape, dtype=torch.uint8, device="meta")
            self.register_parameter(name, nn.Parameter(half, requires_grad=False))
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) in the type of the computation to (..., r)."""
        output: Tensor = cast(Any, _Product).apply(x, self.codes, self.scales, self.bias, self.form)
        return output


def num_weights(network: nn.Module) -> int:
    """Elements of all parameters, of packed layers those that the bytes stand for."""
    packed = [m for m in network.modules() if isinstance(m, PackedLinear)]
    num_bytes = sum(m.codes.numel() + m.scales.numel() for m in packed)
    whole = sum(p.numel() for p in network.parameters()) - num_bytes
    return whole + sum(m.in_features * m.out_features for m in packed)


def linear_layers(network: nn.Module, repeated: Sequence[nn.Module]) -> list[str]:
    """Names of the linear layers in a network's repeated blocks.

    What is before and after them is small, and every sample passes through it.
    """
    inside = {id(m) for block in repeated for m in block.modules() if isinstance(m, nn.Linear)}
    return [name for name, module in network.named_modules() if id(module) in inside]


def torch_packs() -> bool:
    """Whether FSDP2 of this torch shards parameters of bytes."""
    return tuple(int(part) for part in torch.__version__.split(".")[:2]) >= FIRST_TORCH


def require_packable(network: nn.Module, layers: Sequence[str], form: BaseForm) -> None:
    """Raise ValueError where this environment, or this form, cannot hold these layers."""
    if not torch_packs():
        needed = ".".join(map(str, FIRST_TORCH))
        raise ValueError(
            f"lora.base {form}: FSDP2 of torch {torch.__version__} shards no bytes; it takes torch "
            f"{needed} or newer, or lora.base=bfloat16"
        )
    if not layers:
        raise ValueError(f"lora.base {form}: no block of this teacher has a linear layer to pack")
    require_library(form)
    if form == "nf4":
        for name in layers:
            if (width := cast(nn.Linear, network.get_submodule(name)).in_features) % BLOCK:
                raise ValueError(
                    f"lora.base nf4: {name} reads {width} numbers, which are no whole blocks of "
                    f"{BLOCK}; say lora.base=int8"
                )


def require_library(form: BaseForm) -> None:
    """Raise ValueError where what packs is not installed.

    It is not imported: it asks for the GPU then, and forks of who asked cannot use one.
    """
    if form != "nf4":
        return
    try:
        distribution("bitsandbytes")
    except PackageNotFoundError as error:
        raise ValueError(
            "lora.base nf4 is packed by the package bitsandbytes: pip install bitsandbytes"
        ) from error


def load_library(form: BaseForm) -> None:
    """Have the operations that pack and unpack in torch.ops."""
    if form == "nf4":
        importlib.import_module("bitsandbytes")


@dataclass(frozen=True)
class _Half:
    """Codes or scales of a layer, whose rows are packed when they are asked for."""

    shape: Size
    rows: Callable[[int, int], tuple[Tensor, Tensor]]  # packed, from a first to before a last
    half: int

    def __getitem__(self, rows: Any) -> Tensor:
        part = rows[0] if isinstance(rows, tuple) else slice(None)
        first, last, _ = part.indices(self.shape[0])
        return self.rows(first, last)[self.half]


def with_packed(
    source: NetworkSource, layers: Sequence[str], form: BaseForm, device: torch.device
) -> NetworkSource:
    """A network whose layers are packed on `device` while they are read, one at a time."""
    network = source.network
    linear = {place: cast(nn.Linear, network.get_submodule(place)) for place in layers}
    shapes = {
        place: halves_of(layer.out_features, layer.in_features, form)
        for place, layer in linear.items()
    }
    for place, layer in linear.items():
        network.set_submodule(place, PackedLinear(layer, form))

    @lru_cache(maxsize=1)  # the scales of the layer whose codes were asked for before
    def rows(place: str, first: int, last: int) -> tuple[Tensor, Tensor]:
        return pack(source.read(f"{place}.weight")[first:last].to(device), form)

    def read(key: str) -> Stored:
        place, _, half = key.rpartition(".")
        if place in shapes and half in HALVES:
            return _Half(shapes[place][half], partial(rows, place), HALVES.index(half))
        return source.read(key)

    return replace(source, read=read)


def as_packed(weights: Weights, layers: Sequence[str], form: BaseForm) -> Weights:
    """A network's weights with those of its layers as they are once packed, in float32.

    Raises ValueError where the library that packs is not installed.
    """
    require_library(form)
    keys = {f"{name}.weight" for name in layers}

    def read(key: str) -> Stored:
        stored = weights.read(key)
        if key not in keys:
            return stored
        return Computed(stored.shape, lambda: unpack(*pack(stored[...], form), form, torch.float32))

    return replace(weights, read=read)
