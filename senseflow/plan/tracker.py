"""What an iteration holds, sends and computes, by phase: a watch on every operation of it.

A storage counts from the operation that makes it until its last tensor is gone, or as FSDP2 resizes
it. Two views of one storage count once. Libraries' own work space, which no tensor holds, is not
seen; nor is what an allocator loses between storages.
"""

import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, register_flop_formula

from senseflow.distill.measures import STOPWATCH
from senseflow.plan.memo import Memo

aten = torch.ops.aten
PARAMETERS = "parameters"
GRADIENTS = "gradients"
STATES = "optimizer states"
AVERAGES = "averages (EMA)"
GATHERED = "gathered units"
REDUCED = "gradients on their way"
REST = "activations and temporaries"
OFFLOADED = "beside it, in host memory"  # no part of what lives on the GPU
KINDS = (PARAMETERS, GRADIENTS, STATES, AVERAGES, GATHERED, REDUCED, REST, OFFLOADED)

COLLECTIVES = {
    "all-gather": ("allgather", "all_gather"),
    "reduce-scatter": ("reduce_scatter",),
    "all-reduce": ("allreduce", "all_reduce"),
}
PASSED_ON = {aten.copy_, aten._to_copy}  # a reduced gradient stays one


@register_flop_formula(aten._native_multi_head_attention)
def fused_attention(query: torch.Size, *_: Any, **__: Any) -> int:
    """FLOPs of attention among (B, N, W) tokens with its four projections, which torch's own table
    lacks: what nn.MultiheadAttention, open_clip's, asks for where no gradient is wanted."""
    batch, num, width = query
    return batch * (8 * num * width**2 + 4 * num**2 * width)


@dataclass
class PhaseCost:
    """One phase of an iteration on one rank."""

    peak: int = 0  # bytes, all kinds together
    parts: dict[str, int] = field(default_factory=dict)  # of the peak, by kind
    operations: int = 0  # that the host starts
    gatherings: int = 0  # of FSDP2's units
    flops: int = 0
    work: Counter[str] = field(default_factory=Counter)  # of it, by what did it
    sent: Counter[str] = field(default_factory=Counter)  # bytes of whole tensors, by collective
    calls: Counter[str] = field(default_factory=Counter)


@dataclass
class Held:
    """A storage that lives."""

    reference: "weakref.ref[torch.UntypedStorage]"
    size: int
    kind: str


class Tracker(TorchDispatchMode):
    """Within a fake mode: the storages that live, by kind, and the costs of each phase.

    memo: of that mode.
    """

    def __init__(self, memo: Memo | None = None) -> None:
        super().__init__()
        self.memo = memo or Memo()
        self.held: dict[int, Held] = {}
        self.live: dict[str, int] = dict.fromkeys(KINDS, 0)
        self.phases: dict[str, PhaseCost] = {}
        self.callers: list[str] = []  # the networks whose forward runs, the outermost first
        self.patched = patch.object(torch.UntypedStorage, "resize_", self._resizing())

    def __enter__(self) -> "Tracker":
        self.patched.start()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.patched.stop()

    def mark(self, tensors: Iterable[Tensor], kind: str) -> int:
        """Say what tensors are; returns the bytes of those that were not said to be of it."""
        before = self.live[kind]
        for tensor in tensors:
            self._note(tensor, kind)
        return self.live[kind] - before

    @property
    def now(self) -> int:
        """The bytes of all storages that live now, but those in host memory."""
        return sum(self.live.values()) - self.live[OFFLOADED]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        result = self.memo.run(func, args, kwargs)
        if (
            func.namespace == "prim"
        ):  # a fake tensor is asked for its device: no work, on a real one
            return result
        packet, cost = func._overloadpacket, self._cost()
        cost.operations += 1
        if packet in flop_registry:
            flops = flop_registry[packet](*args, **kwargs, out_val=result)
            cost.flops += flops
            who = self.callers[0] if self.callers else f"backward, {STOPWATCH.current}"
            cost.work[who] += flops
        for tensor in [result] if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor)
        if func.namespace == "fsdp":
            cost.gatherings += packet is torch.ops.fsdp.all_gather_copy_in
            self._note_fsdp(packet, args, kwargs)
        elif func.namespace in ("c10d", "_c10d_functional"):
            self._note_collective(func, args, cost)
        elif packet in PASSED_ON:
            self._note_copy(result, args)
        return result

    def _cost(self) -> PhaseCost:
        name = STOPWATCH.current or "between"
        if name not in self.phases:
            self.phases[name] = PhaseCost()
        return self.phases[name]

    def _note(self, tensor: Tensor, kind: str | None = None) -> None:
        """Count the storage of a tensor, once; with a kind, under it from now on."""
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        storage = local.untyped_storage()
        key = id(storage)
        held = self.held.get(key)
        if held is None:
            reference = weakref.ref(storage, partial(self._release, key))
            held = self.held[key] = Held(reference, 0, kind or REST)
        elif kind and kind != held.kind:
            self.live[held.kind] -= held.size
            self.live[kind] += held.size
            held.kind = kind
        if held.size != storage.nbytes():
            self._resized(held, storage.nbytes())

    def _resized(self, held: Held, size: int) -> None:
        self.live[held.kind] += size - held.size
        grown, held.size = size > held.size, size
        if grown:
            cost, now = self._cost(), self.now
            if now > cost.peak:
                cost.peak, cost.parts = now, dict(self.live)

    def _release(self, key: int, _: Any) -> None:
        held = self.held.pop(key)
        self.live[held.kind] -= held.size

    def _resizing(self) -> Any:
        """FSDP2 frees and allocates the tensors of its units by resizing their storages."""
        resize = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            held = self.held.get(id(storage))
            if held:
                self._resized(held, size)
            return result

        return resize_

    def _note_fsdp(self, packet: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """The buffers of FSDP2's own operations: of gathering, and of reduction."""
        is_reduction = "chunk_cat" in str(packet)
        for tensor in tree_leaves(kwargs.get("out", args[1] if not is_reduction else ())):
            if isinstance(tensor, Tensor):
                self._note(tensor, REDUCED if is_reduction else GATHERED)

    def _note_collective(self, func: Any, args: Any, cost: PhaseCost) -> None:
        """Bytes of the larger side: what is gathered whole, or reduced whole."""
        name = func._overloadpacket.__name__
        for collective, marks in COLLECTIVES.items():
            if any(mark in name for mark in marks):
                tensors = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
                cost.sent[collective] += max(t.numel() * t.element_size() for t in tensors)
                cost.calls[collective] += 1
                if collective == "reduce-scatter" and len(tensors) == 2:
                    self._note(min(tensors, key=Tensor.numel), GRADIENTS)

    def _note_copy(self, result: Tensor, args: Any) -> None:
        """On one rank nothing is reduced: the gradient is a copy of the buffer."""
        source = args[1] if len(args) > 1 and isinstance(args[1], Tensor) else args[0]
        held = self.held.get(id(source.untyped_storage()))
        if held and held.kind in (REDUCED, GRADIENTS):
            target = self.held[id(result.untyped_storage())]
            if target.kind == REST:
                self._note(result, GRADIENTS)
