"""What is remembered against torch's own fake mode: operations three times, with and without."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DynamicOutputShapeException,
    FakeTensorMode,
    is_fake,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from senseflow.plan.memo import Memo

aten = torch.ops.aten


class Remembering(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.memo = Memo()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.memo.run(func, args, kwargs or {})


def made(shift: int = 0) -> dict[str, Tensor]:
    """x begins `shift` elements into its storage."""
    flat = torch.empty(200)
    return {
        "x": flat[shift : shift + 24].view(2, 3, 4),
        "y": torch.empty(2, 3, 4),
        "half": torch.empty(2, 3, 4, dtype=torch.bfloat16),
        "map": torch.empty(2, 8, 6, 6).to(memory_format=torch.channels_last),
        "index": torch.empty(2, dtype=torch.int64),
    }


OPERATIONS: dict[str, Callable[..., object]] = {
    "add": lambda t: t["x"] + t["y"],
    "to a wider type": lambda t: t["x"] * t["half"],
    "with an integer": lambda t: t["index"] + 1,
    "with a number": lambda t: t["index"] + 1.0,
    "with a truth": lambda t: t["index"] + True,
    "broadcast": lambda t: t["x"] + t["y"][:1, :, 2:3],
    "transposed": lambda t: t["x"].transpose(0, 2),
    "a part": lambda t: t["x"][:, 1:],
    "unsafe view": lambda t: aten._unsafe_view(t["y"], [6, 4]),
    "expanded": lambda t: t["x"][:, None].expand(2, 5, 3, 4),
    "in place": lambda t: t["x"].mul_(t["y"]),
    "copied": lambda t: t["x"].copy_(t["half"]),
    "pieces": lambda t: t["x"].split([1, 2], dim=1),
    "each": lambda t: t["x"].unbind(1),
    "two results": lambda t: torch.max(t["x"], dim=1),
    "each in place": lambda t: torch._foreach_mul_([t["x"], t["y"]], 2.0),
    "each anew": lambda t: torch._foreach_norm([t["x"], t["y"]]),
    "channels last": lambda t: torch.nn.functional.conv2d(t["map"], torch.empty(4, 8, 3, 3)),
    "norm": lambda t: torch.nn.functional.group_norm(t["map"], 2),
    "attention": lambda t: torch.nn.functional.scaled_dot_product_attention(
        t["map"], t["map"], t["map"]
    ),
    "chosen": lambda t: t["x"][t["index"]],
    "from nothing": lambda t: torch.arange(5),
    "complex": lambda t: torch.view_as_complex(t["x"].unflatten(2, (2, 2))) * 2,
    "laid out anew": lambda t: torch.as_strided(t["x"], (3,), (2,), 5),
    "grown": lambda t: t["y"].resize_(5, 5),
    "given a storage": lambda t: t["half"].set_(torch.empty(7, dtype=torch.bfloat16)),
    "wider view": lambda t: t["y"].view(torch.bfloat16),
}


def facts(name: str, shift: int) -> object:
    """All that a later operation sees of the results, and of the arguments afterwards."""
    tensors = made(shift)
    result = OPERATIONS[name](tensors)
    storages = {id(t.untyped_storage()): key for key, t in tensors.items()}
    leaves = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
    return (
        type(result),
        [
            (
                *(x.shape, x.stride(), x.dtype, x.device, x.layout, x.storage_offset()),
                *(x.untyped_storage().nbytes(), x.requires_grad, x.is_contiguous()),
                storages.get(id(x.untyped_storage())),
                [key for key, tensor in tensors.items() if tensor is x],
                torch._C._dispatch_key_set(x),
            )
            for x in [*leaves, *tensors.values()]
        ],
    )


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_is_remembered_is_what_the_fake_mode_gives(name):
    with FakeTensorMode():
        expected = [facts(name, shift) for shift in (0, 8, 8)]
    with FakeTensorMode(), Remembering():
        assert [facts(name, shift) for shift in (0, 8, 8)] == expected
    with FakeTensorMode(), Remembering():  # first seen where x begins in its storage's midst
        assert [facts(name, shift) for shift in (8, 0, 8)] == [expected[i] for i in (1, 0, 1)]


def test_the_fake_mode_is_asked_once(monkeypatch):
    asked, counts = [], []
    with FakeTensorMode() as mode, Remembering():
        whole = mode.dispatch
        monkeypatch.setattr(mode, "dispatch", lambda *a: asked.append(a[0]) or whole(*a))
        x = torch.empty(4, 4)
        for _ in range(3):
            ((x @ x).view(16)[2:] + 1).mul_(2)
            counts.append(len(asked))
    operations = {aten.mm, aten.view, aten.slice, aten.add, aten.mul_}
    assert operations < {func._overloadpacket for func in asked}
    assert counts == counts[:1] * 3


def test_what_the_fake_mode_refuses_is_refused_again():
    with FakeTensorMode(), Remembering():
        x = torch.empty(4)
        for _ in range(2):
            with pytest.raises(DynamicOutputShapeException):
                x[torch.empty(4, dtype=torch.bool)]
        y = torch.empty(4, dtype=torch.int64)
        assert [x[y].shape for _ in range(2)] == [(4,)] * 2


def test_gradients_go_through_what_is_remembered():
    with FakeTensorMode(), Remembering():
        for _ in range(3):
            x = torch.empty(3, 4, requires_grad=True)
            y = (x.view(12).exp() * 2).sum()
            y.backward()
            assert x.grad is not None and x.grad.shape == x.shape and y.requires_grad


def test_real_tensors_pass():
    with Remembering():
        assert [(torch.ones(3) + 1).tolist() for _ in range(2)] == [[2.0] * 3] * 2


def test_a_fake_mode_that_is_set_aside_is_not_remembered():
    """As where a plan asks a mesh for a shard's place, by an arange that a network made too."""
    with FakeTensorMode(), Remembering():
        assert torch.arange(3, 5).shape == (2,)
        with unset_fake_temporarily():
            assert torch.arange(3, 5).tolist() == [3, 4]
        assert is_fake(torch.arange(3, 5))


def test_operations_on_other_types_strides_or_numbers_are_others():
    with FakeTensorMode(), Remembering():
        for dtype in (torch.float32, torch.bfloat16, torch.float32):
            x = torch.empty(2, 3, 3, dtype=dtype)
            assert (x * x).dtype == dtype
            assert x.mT.exp().stride() == x.mT.stride() != x.exp().stride() == x.stride()
            assert [x.sum(dim).shape for dim in (0, 1)] == [(3, 3), (2, 3)]
