"""What operations give on fake tensors, remembered by the shapes of what they get.

A trace is the same few hundred operations, block after block and step after step. torch's fake mode
remembers results too, but asks each argument for all that a tensor can be, and makes each result
anew with all of it: ten times the cost of an operation itself. What a plan's tensors are is less:
dense, real, whole in size. Whatever else there is goes to the fake mode, as does an operation when
it is first seen, and one whose result this could not make again to the last property.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

Key = list[Any]
Maker = Callable[[Sequence[FakeTensor]], Any]  # the result, of the tensors among the arguments
NUMBERS = {int, float, bool, str, type(None)}
NUMBERS |= {torch.dtype, torch.device, torch.layout, torch.memory_format}
SEQUENCES = {list, tuple, torch.Size}


class Memo:
    """Results of one fake mode's operations."""

    def __init__(self) -> None:
        self.makers: dict[tuple[Any, ...], Maker | None] = {}

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """What `func(*args, **kwargs)` gives within a fake mode."""
        if func is torch.ops.prim.device.default and type(args[0]) is FakeTensor:
            return args[0].fake_device
        if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is None:
            return func(*args, **kwargs)  # set aside for a moment: numbers are wanted, not shapes
        found: list[FakeTensor] = []
        described = _describe(func, args, kwargs, found) if _is_plain(func) else None
        if described is None:
            return func(*args, **kwargs)
        key = tuple(described)
        try:
            maker = self.makers[key]
        except KeyError:
            result = func(*args, **kwargs)
            unchanged = _describe(func, args, kwargs, []) == described
            self.makers[key] = _maker(result, func, found) if unchanged else None
            return result
        return maker(found) if maker else func(*args, **kwargs)


@cache
def _is_plain(func: Any) -> bool:
    """Whether an operation's result is known by the shapes of what it gets: none of a library's
    own, none that gives a tensor another shape or storage, none with a place of its own in one."""
    return (
        func.namespace == "aten"
        and torch.Tag.inplace_view not in func.tags
        and func._overloadpacket is not torch.ops.aten.as_strided
        and not any(argument.is_out for argument in func._schema.arguments)
    )


def _describe(func: Any, args: Any, kwargs: dict[str, Any], found: list[FakeTensor]) -> Key | None:
    """All that a result hangs on; the tensors are added to `found`. None: more than that."""
    key: Key = [func, torch.get_default_dtype(), *kwargs]
    described = _add(key, args, found) and (not kwargs or _add(key, kwargs.values(), found))
    return key if described else None


def _add(key: Key, values: Iterable[Any], found: list[FakeTensor]) -> bool:
    for value in values:
        kind = type(value)
        if kind is FakeTensor:
            dtype = value.dtype
            if value.constant is not None or dtype.is_complex or value.layout != torch.strided:
                return False
            key += (value.shape, value.stride(), dtype, value.fake_device)
            found.append(value)
        elif kind in NUMBERS:
            key += (kind, value)
        elif kind in SEQUENCES:
            key += (kind, len(value))
            if not _add(key, value, found):
                return False
        else:
            return False
    return True


def _maker(result: Any, func: Any, found: Sequence[FakeTensor]) -> Maker | None:
    """How to make a result again; None where this does not know how."""
    if result is None:
        return lambda _: None
    if isinstance(result, Tensor):
        return _tensor_maker(result, func, found)
    if type(result) not in (list, tuple):
        return None
    storages = [x.untyped_storage()._cdata for x in result if isinstance(x, Tensor)]
    makers = [_tensor_maker(x, func, found) for x in result]
    known = [maker for maker in makers if maker]
    shared = len(storages) > len({*storages})
    if len(known) < len(makers) or (shared and not all(map(_is_of_argument, known))):
        return None
    kind = type(result)
    return lambda tensors: kind([maker(tensors) for maker in known])


def _is_of_argument(maker: Maker) -> bool:
    return isinstance(maker, Same | View)


def _tensor_maker(result: Any, func: Any, found: Sequence[FakeTensor]) -> Maker | None:
    for index, tensor in enumerate(found):
        if result is tensor:
            return Same(index)
    if type(result) is not FakeTensor or result.constant is not None or result.requires_grad:
        return None
    if result.layout != torch.strided or result.dtype.is_complex:
        return None
    storage = result.untyped_storage()
    device, attributes = result.fake_device, dict(vars(result))
    like = Like(result.shape, result.stride(), result.dtype, device, attributes)
    if any(storage._cdata == tensor.untyped_storage()._cdata for tensor in found):
        if len(found) > 1 or found[0].dtype != result.dtype:
            return None
        view = View(like, int(result.storage_offset() - found[0].storage_offset()))
        return view if _alike(view(found), result) else None
    fresh = Fresh(like)
    return fresh if _alike(fresh(found), result) else None


def _alike(made: FakeTensor, result: FakeTensor) -> bool:
    """Whether they are one in all that a later operation or a tracker can see."""
    return bool(
        torch._C._dispatch_key_set(made) == torch._C._dispatch_key_set(result)
        and made.untyped_storage().nbytes() == result.untyped_storage().nbytes()
        and made.storage_offset() == result.storage_offset()
        and made.shape == result.shape
        and made.stride() == result.stride()
        and made.dtype == result.dtype
        and vars(made) == vars(result)
    )


@dataclass(frozen=True)
class Like:
    """What a tensor is, but for its storage."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    attributes: dict[str, Any]  # that torch gives every fake tensor, its mode with them

    def wrap(self, elem: Tensor) -> FakeTensor:
        """The fake tensor of one on the meta device, as torch's own constructor makes it."""
        made: FakeTensor = Tensor._make_subclass(
            FakeTensor,
            elem,
            False,
            dispatch_device=True,
            device_for_backend_keys=self.device,
        )
        torch._C._set_throw_on_mutable_data_ptr(made)
        vars(made).update(self.attributes)
        return made


@dataclass(frozen=True)
class Same:
    """An operation in place: what it was given."""

    index: int  # among the tensors of its arguments

    def __call__(self, found: Sequence[FakeTensor]) -> FakeTensor:
        """That tensor."""
        return found[self.index]


@dataclass(frozen=True)
class Fresh:
    """A result with a storage of its own."""

    like: Like

    def __call__(self, _: Sequence[FakeTensor]) -> FakeTensor:
        """Such a tensor."""
        like = self.like
        with torch._C._DisableTorchDispatch():
            elem = torch.empty_strided(like.shape, like.stride, dtype=like.dtype, device="meta")
        return like.wrap(elem)


@dataclass(frozen=True)
class View:
    """A view of the one tensor that an operation was given."""

    like: Like
    shift: int  # elements, from where that one begins

    def __call__(self, found: Sequence[FakeTensor]) -> FakeTensor:
        """The same view of that tensor."""
        like, base = self.like, found[0]
        offset, storage = base.storage_offset() + self.shift, base.untyped_storage()
        with torch._C._DisableTorchDispatch():
            elem = torch.empty_strided((), (), dtype=like.dtype, device="meta")
            elem.set_(storage, offset, like.shape, like.stride)
        return like.wrap(elem)
