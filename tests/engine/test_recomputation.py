"""Selective recomputation of a block that is small enough to say what it saves and computes."""

from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils.checkpoint import noop_context_fn
from torch.utils.flop_counter import FlopCounterMode

from senseflow.engine.recomputation import spare_products

B, L, D = 2, 5, 8


class Block(nn.Module):
    """Every kind of product, with something cheap between any two, and inputs in a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D, bias=False)
        self.conv, self.frozen = nn.Conv1d(D, D, 3, padding=1), nn.Linear(D, D)
        self.frozen.requires_grad_(False)
        self.modes: list[int] = []

    def forward(self, x: Tensor, scale: tuple[Tensor, Tensor]) -> Tensor:
        self.modes.append(len(_get_current_dispatch_mode_stack()))
        x = F.layer_norm(x, (D,)) * scale[0] + scale[1]
        q, k, v = (part.unsqueeze(1).sin() for part in self.qkv(x).chunk(3, dim=-1))
        x = x + F.scaled_dot_product_attention(q, k, v).squeeze(1)
        x = self.out(F.gelu(x)) + self.frozen(x.exp())
        return self.conv(F.silu(x).transpose(1, 2)).transpose(1, 2).tanh() * x


def parts() -> tuple[Block, Tensor, tuple[Tensor, Tensor]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x, one, two = torch.randn(B, L, D), torch.randn(D), torch.randn(D)
        return Block(), x.requires_grad_(), (one.requires_grad_(), two)


def gradients(
    block: Block, x: Tensor, scale: tuple[Tensor, Tensor], times: int = 1
) -> list[Tensor]:
    loss = block(x, scale).square().mean()
    wanted = [x, scale[0], *(p for p in block.parameters() if p.requires_grad)]
    found: list[Tensor] = []
    for time in range(times):
        found += torch.autograd.grad(loss, wanted, retain_graph=time < times - 1)
    return found


def test_the_same_gradients_to_the_bit_also_when_the_way_back_is_gone_twice():
    expected = gradients(*parts())
    block, *inputs = parts()
    spare_products(block, noop_context_fn)
    found = gradients(block, *inputs, times=2)
    assert len(found) == 2 * len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, 2 * expected, strict=True))


def test_no_product_is_computed_twice_and_cheap_operations_are():
    """A linear layer of B L rows is 2 B L D_in D_out FLOPs, each way of its backward as many."""
    counts = {}
    for spared in (False, True):
        block, *inputs = parts()
        if spared:
            spare_products(block, noop_context_fn)
        with FlopCounterMode(display=False) as counter, Names() as names:
            block(*inputs).square().mean().backward()
        counts[spared] = counter.get_total_flops()
        assert names.seen.count("native_layer_norm") == 1 + spared
        assert names.seen.count("gelu") == names.seen.count("sin") // 3 == 1 + spared
        assert names.seen.count("addmm") == 2  # of qkv and of the frozen one
    assert counts[True] == counts[False]
    linear = 2 * B * L * D * D
    # qkv and conv have three times a layer's weights; the frozen one's have no gradient
    least = 3 * 3 * linear + 3 * linear + 2 * linear + 3 * 3 * linear
    attention = 2 * 2 * B * L * L * D
    assert least + 3 * attention <= counts[True] <= least + 4 * attention


class Names(TorchDispatchMode):
    """What reaches a backend."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_what_lives_until_the_way_back_are_inputs_and_what_products_gave():
    block, x, scale = parts()
    spare_products(block, noop_context_fn)
    kept: list[Tensor] = []
    real = Tensor.detach

    def detach(tensor: Tensor) -> Tensor:
        kept.append(real(tensor))
        return kept[-1]

    with patch.object(Tensor, "detach", detach):
        block(x, scale)
    rows = sum(t.numel() for t in {t.untyped_storage()._cdata: t for t in kept}.values())
    weights = sum(p.numel() for p in block.parameters() if p.ndim > 1)
    lse = B * L
    # qkv 3, attention 1, out 1, the frozen 1, conv 1, of B L D each
    assert rows - weights - lse == 7 * B * L * D


def test_no_mode_is_around_operations_and_attention_is_torchs_again():
    block, *inputs = parts()
    attention = F.scaled_dot_product_attention
    spare_products(block, noop_context_fn)
    gradients(block, *inputs)
    assert block.modes == [0, 0]
    assert F.scaled_dot_product_attention is attention
    with torch.no_grad():
        assert not block(*inputs).requires_grad
    assert block.modes == [0, 0, 0]


class Careless(nn.Module):
    """Writes to what a product gave."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.sin()).add_(1).sin()


def test_a_product_that_is_written_to_is_no_wrong_gradient():
    block = Careless()
    spare_products(block, noop_context_fn)
    with pytest.raises(AssertionError, match="a product was written to"):
        block(torch.ones(1, D)).sum().backward()
