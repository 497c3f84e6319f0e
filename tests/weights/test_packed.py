"""A base in 4 or 8 bits: its bytes, its products, its gradients, and what it cannot hold."""

from dataclasses import replace
from importlib.metadata import PackageNotFoundError

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from lora_parts import CASES, Shared, gradients, make_shared
from ranks import on_ranks
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from senseflow.weights import packed
from senseflow.weights.packed import PackedLinear, pack, require_packable, unpack

FORMS = ("int8", "nf4")


def wide() -> FluxTransformer2DModel:
    """1 + 1 blocks of width 64, whose rows are whole blocks of 64."""
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    ).eval()


WIDE = replace(CASES["flux"], make=wide)


def rounded(weight: Tensor, form: str) -> Tensor:
    """What a weight is once packed, in float32: by bitsandbytes' own functions, or by hand."""
    if form == "nf4":
        codes, state = bnb.quantize_4bit(weight.float(), blocksize=64, quant_type="nf4")
        return bnb.dequantize_4bit(codes, state)
    array = weight.float().numpy()
    steps = np.abs(array).max(1, keepdims=True) / np.float32(127)
    return torch.from_numpy(steps * np.rint(array / np.where(steps > 0, steps, 1)))


def weights(rows: int = 9, columns: int = 128) -> Tensor:
    """Rows of different sizes, one of zeros."""
    drawn = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    drawn *= torch.logspace(-4, 1, rows)[:, None]
    drawn[rows // 2] = 0
    return drawn


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("form", FORMS)
def test_unpacked_is_what_the_library_gives(form, dtype):
    weight = weights().to(dtype)
    codes, scales = pack(weight, form)
    expected = rounded(weight, form)
    torch.testing.assert_close(
        unpack(codes, scales, form, torch.float32), expected, rtol=1e-6 * (form == "int8"), atol=0
    )
    once = unpack(codes, scales, form, torch.float32).to(torch.bfloat16)
    assert torch.equal(unpack(codes, scales, form, torch.bfloat16), once)
    num_bytes = codes.nbytes + scales.nbytes
    assert num_bytes == {"int8": 9 * (128 + 4), "nf4": 9 * (64 + 4 * 2)}[form]


@pytest.mark.parametrize("form", FORMS)
def test_the_bytes_of_a_row_are_its_own(form, monkeypatch):
    """Whatever rows are packed with it: none (of an empty shard), a few, or in several parts."""
    weight = weights()
    whole = pack(weight, form)
    for first, last in ((0, 0), (2, 5), (9, 9)):
        part = pack(weight[first:last], form)
        assert all(torch.equal(a, b[first:last]) for a, b in zip(part, whole, strict=True))
    monkeypatch.setattr(packed, "AT_ONCE", 300)
    assert all(torch.equal(a, b) for a, b in zip(pack(weight, form), whole, strict=True))


def layer(form: str, dtype: torch.dtype) -> tuple[PackedLinear, nn.Linear]:
    """A packed layer, and a plain one of the weights that the library unpacks."""
    plain = nn.Linear(128, 9, dtype=dtype).requires_grad_(False)
    plain.weight.copy_(weights())
    small = PackedLinear(nn.Linear(128, 9), form).to_empty(device="cpu")
    for half, values in zip(packed.HALVES, pack(plain.weight, form), strict=True):
        getattr(small, half).copy_(values)
    small.bias = plain.bias
    plain.weight = nn.Parameter(rounded(plain.weight, form).to(dtype), requires_grad=False)
    return small, plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("form", FORMS)
def test_products_and_gradients_are_those_of_a_plain_layer(form, dtype):
    found = []
    for network in layer(form, dtype):
        x = torch.linspace(-1, 1, 2 * 3 * 128).sin().view(2, 3, 128).to(dtype).requires_grad_(True)
        y = network(x)
        (y.float() ** 2).sum().backward()
        found.append((y.detach(), x.grad))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5 if dtype == torch.float32 else 0, atol=0)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("form", FORMS)
def test_no_unpacked_weight_waits_for_the_way_back(form, compiled):
    network, _ = layer(form, torch.float32)
    kept: list[torch.Size] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.shape)
        return tensor

    def call(x: Tensor) -> Tensor:
        return F.silu(network(x))

    run = torch.compile(call, backend="aot_eager_decomp_partition") if compiled else call
    x = torch.ones(5, 128, requires_grad=True)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        y = run(x)
    assert {network.codes.shape, network.scales.shape, y.shape} == set(kept)
    y.sum().backward()
    assert x.grad is not None and x.grad.any()


def unpacked_like(shared: Shared, form: str) -> nn.Module:
    """The plain network with the weights that its blocks' linear layers have once packed."""
    network = wide().requires_grad_(False)
    network.load_state_dict(shared.plain.state_dict())
    for block in shared.case.recomputed(network):
        for module in block.modules():
            if isinstance(module, nn.Linear):
                module.weight.data = rounded(module.weight, form)
    return network


def backward(shared: Shared, role: nn.Module) -> Tensor:
    loss = shared.run(role).square().mean()
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("form", FORMS)
def test_a_shared_base_is_the_unpacked_network(form):
    shared = make_shared(WIDE, base=form)
    with torch.no_grad():
        teacher, plain = shared.run(shared.teacher), shared.run(unpacked_like(shared, form))
        torch.testing.assert_close(teacher, plain, rtol=1e-5, atol=1e-6)
        assert (teacher - shared.run(shared.plain)).abs().max() > 1e-4
    held = shared.teacher.base.network
    small = [m for m in held.modules() if isinstance(m, PackedLinear)]
    linear = [m for b in WIDE.blocks(wide()) for m in b.modules() if isinstance(m, nn.Linear)]
    assert len(small) == len(linear) == packed_layers(held)
    adapters = sum(p.numel() for k, p in held.named_parameters() if ".lora_" in k)
    assert packed.num_weights(held) == adapters + sum(p.numel() for p in wide().parameters())


def packed_layers(network: nn.Module) -> int:
    return sum(key.endswith(".codes") for key in network.state_dict())


@pytest.mark.parametrize("form", FORMS)
def test_adapters_on_it_learn_as_on_the_unpacked_network(form):
    shared = make_shared(WIDE, "AB", base=form)

    def make() -> nn.Module:
        meta = torch.get_default_device().type == "meta"
        return wide() if meta else unpacked_like(shared, form)

    whole = make_shared(replace(WIDE, make=make), "AB")
    torch.testing.assert_close(backward(shared, shared.generator), backward(whole, whole.generator))
    one, two = gradients(shared.generator), gradients(whole.generator)
    assert one.keys() == two.keys() == dict(shared.generator.named_parameters()).keys()
    for key, value in one.items():
        torch.testing.assert_close(value, two[key], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("selective", [False, True])
def test_recomputation_gives_the_same_gradients_to_the_bit(selective):
    kept = make_shared(WIDE, base="nf4")
    again = make_shared(WIDE, every=1, selective=selective, base="nf4")
    assert torch.equal(backward(kept, kept.generator), backward(again, again.generator))
    one, two = gradients(kept.generator), gradients(again.generator)
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def check_two_ranks(rank: int, form: str, expected: dict[str, Tensor], held: Tensor) -> None:
    shared = make_shared(WIDE, "AB", every=1, base=form)
    codes = shared.teacher.base.network.transformer_blocks[0].attn.to_q.base_layer.codes
    assert codes.to_local().shape[0] == 32 and torch.equal(codes.full_tensor(), held)
    found = {"loss": backward(shared, shared.generator), **gradients(shared.generator)}
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-7)


@pytest.mark.long
@pytest.mark.parametrize("form", FORMS)
def test_two_ranks_give_the_gradients_of_one(form):
    shared = make_shared(WIDE, "AB", every=1, base=form)
    expected = {"loss": backward(shared, shared.generator), **gradients(shared.generator)}
    codes = shared.teacher.base.network.transformer_blocks[0].attn.to_q.base_layer.codes
    on_ranks(2, check_two_ranks, form, expected, codes.full_tensor())


@pytest.mark.parametrize(
    ("change", "form", "said"),
    [
        ("narrow", "nf4", r"transformer_blocks\.0\.\S+ reads 32 numbers, .* say lora.base=int8$"),
        ("no blocks", "int8", "no block of this teacher has a linear layer to pack"),
        ("no library", "nf4", "packed by the package bitsandbytes: pip install bitsandbytes$"),
        (
            "old torch",
            "int8",
            r"torch 2\.11\.1\+cu128 shards no bytes; it takes torch 2\.12 or newer",
        ),
    ],
)
def test_what_cannot_be_packed_is_one_line(change, form, said, monkeypatch):
    network = CASES["flux"].make() if change == "narrow" else wide()
    layers = packed.linear_layers(network, [] if change == "no blocks" else WIDE.blocks(network))
    if change == "no library":
        monkeypatch.setattr(packed, "distribution", absent)
    if change == "old torch":
        monkeypatch.setattr(torch, "__version__", "2.11.1+cu128")
    with pytest.raises(ValueError, match=f"^lora.base {form}.*{said}"):
        require_packable(network, layers, form)


def absent(name: str) -> None:
    raise PackageNotFoundError(name)
