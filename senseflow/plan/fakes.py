"""Ranks without processes and networks without memory: what a plan traces instead of a run's.

Tensors are torch's fake ones: shapes, types and storages with a size, and no numbers. The process
group is torch's fake one: collectives return at once, whatever the number of ranks.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ParamSpec, TypeVar
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from senseflow.common.ranks import Ranks, start_ranks
from senseflow.core.names import BaseForm
from senseflow.engine import adversary
from senseflow.optim import stretches
from senseflow.plan.memo import Memo
from senseflow.weights import packed
from senseflow.weights.filling import materialise

P = ParamSpec("P")
R = TypeVar("R")
aten = torch.ops.aten
LARGE = 2**16  # elements: more than a library looks at while it builds a network
UNREAD = {aten.normal_, aten.uniform_, aten.erfinv_}


@contextmanager
def fake_ranks(world_size: int, replicas: int) -> Iterator[Ranks]:
    """Rank 0 of as many ranks, none of which exists; takes the process group."""
    assert not dist.is_initialized()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield start_ranks(replicas)
    finally:
        dist.destroy_process_group()


@contextmanager
def real_meshes() -> Iterator[None]:
    """Where a shard lies in its parameter is asked of a mesh, whose numbers are real ones."""
    ask = stretches.first_element

    def outside(parameter: Tensor) -> int:
        with unset_fake_temporarily():
            return ask(parameter)

    with patch.object(stretches, "first_element", outside):
        yield


class Loading(TorchDispatchMode):
    """Within a fake mode, while networks are loaded: only their shards are fake.

    What has no fake input stays real, so that libraries may look at numbers (schedules, indices of
    shards); networks on the meta device stay there, until they are given memory: that is fake, as
    is all that is put on a GPU.
    Within a network's forward, such as the encoding of the empty prompt, everything is. Random
    initial values are neither drawn nor normed, nor are weights packed, copied to what is fake or,
    of the discriminator's frozen networks and of rewards, written: it would take time, and nobody
    reads them.
    """

    def __init__(self, memo: Memo) -> None:
        super().__init__()
        self.memo = memo
        self.depth = 0  # of modules that run
        self.reads = False  # a frozen network that is held whole
        self.stack = ExitStack()

    def __enter__(self) -> "Loading":
        def enter(*_: Any) -> None:
            self.depth += 1

        def leave(*_: Any) -> None:
            self.depth -= 1

        self.stack.callback(register_module_forward_pre_hook(enter).remove)
        self.stack.callback(register_module_forward_hook(leave, always_call=True).remove)
        self.stack.enter_context(patch.object(_SpectralNorm, "_power_method", lambda *_: None))
        self.stack.enter_context(patch.object(packed, "pack", _unpacked))
        load = self.unwritten(adversary.load_frozen)
        self.stack.enter_context(patch.object(adversary, "load_frozen", load))
        self.stack.enter_context(patch.object(adversary, "fill_heads", _undrawn))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.stack.close()

    def unwritten(self, function: Callable[P, R]) -> Callable[P, R]:
        """What loads a frozen network whole, on the host, without writing its weights there."""

        def read(*args: P.args, **kwargs: P.kwargs) -> R:
            self.reads = True
            try:
                return function(*args, **kwargs)
            finally:
                self.reads = False

        return read

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        kind = torch.device(kwargs.get("device") or "meta").type
        materialised = kind != "meta" and any(t.is_meta for t in tensors)
        fake = kind == "cuda" or materialised or any(isinstance(t, FakeTensor) for t in tensors)
        if self.depth or fake:
            unread = func._overloadpacket in UNREAD or func is aten.copy_.default
            if unread and isinstance(args[0], FakeTensor):
                return args[0]
            return self.memo.run(func, args, kwargs)
        with unset_fake_temporarily():
            large = self.reads and any(t.numel() >= LARGE for t in tensors[:1])
            # torch.load, in a fake mode, gives tensors without numbers.
            is_copy_of_none = func is aten.copy_.default and args[1].is_meta
            in_place = func._schema.name.endswith("_")
            if func._overloadpacket in UNREAD or is_copy_of_none or (large and in_place):
                return args[0]
            if large and func is aten._to_copy.default:
                kwargs.pop("non_blocking", None)
                return torch.empty_like(args[0], **kwargs)
            return func(*args, **kwargs)


def _undrawn(heads: nn.Module, drawn: Any, ranks: Ranks, initial: Any, offload: bool) -> None:
    """What `fill_heads` leaves, without the numbers."""
    materialise(heads, ranks.device, offload)


def _unpacked(weight: Tensor, form: BaseForm) -> tuple[Tensor, ...]:
    """What `pack` gives, without the numbers."""
    packed.load_library(form)
    sizes = packed.halves_of(weight.shape[0], weight.shape[1], form)
    return tuple(torch.empty(size, dtype=torch.uint8) for size in sizes.values())


def fake_whole(networks: Iterable[nn.Module], mode: FakeTensorMode) -> None:
    """Make the networks that are held whole fake too, in place; shared tensors stay shared."""
    made: dict[int, Tensor] = {}

    def of(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or isinstance(tensor, FakeTensor | DTensor):
            return tensor
        if id(tensor) not in made:
            with mode:
                empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
            is_parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
        return made[id(tensor)]

    for network in networks:
        for module in network.modules():
            tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for held in tables:
                held.update({name: of(tensor) for name, tensor in held.items()})
