"""A GPU that is not there: iterations on fake CUDA tensors, and where the host would wait for it.

Tensors are torch's fake ones with a CUDA device; streams and events do nothing, pinned memory is a
mark on a storage. A GPU works through a queue that the host fills. The host waits for all of it
where it reads a number of the device, and where it copies from memory that may be paged out.
"""

import heapq
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import senseflow

PACKAGE = Path(senseflow.__file__).parent
aten = torch.ops.aten
COPIES = {aten._to_copy, aten.copy_}
READ = {  # the size of what they give, or the number itself, is known to the device alone
    aten._local_scalar_dense,
    aten.equal,
    aten.is_nonzero,
    aten.masked_select,
    aten.nonzero,
    aten._unique2,
    aten.unique_consecutive,
    aten.unique_dim,
    aten.repeat_interleave,
}
Found = Counter[tuple[str, str]]  # (what, where)


class Watch(TorchDispatchMode):
    """Counts the operations for which the host would wait, and those that mix devices.

    A number that is read is 1, so that all of an iteration is seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: Found = Counter()

    def note(self, what: str) -> None:
        """One more of it, here."""
        self.found[what, where()] += 1

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, packet = kwargs or {}, func._overloadpacket
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if packet in COPIES:
            self._copy(packet, args, kwargs)
        elif any(t.is_cuda for t in tensors):
            masked = packet in (aten.index, aten.index_put_) and any(
                i is not None and i.dtype == torch.bool for i in args[1]
            )
            if packet in READ or masked:
                self.note(f"{packet} waits for its result")
            if any(t.device.type == "cpu" for t in tensors):
                self.note(f"{packet} takes a tensor of the host")
            if packet is aten._local_scalar_dense:
                return 1.0 if args[0].is_floating_point() else 1
        return func(*args, **kwargs)

    def _copy(self, packet: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if packet is aten.copy_:
            target, source = args[:2]
            to, free = target.device, len(args) > 2 and args[2]
        else:
            (source,) = args
            to, free = kwargs.get("device"), kwargs.get("non_blocking")
        ways = {source.device.type, torch.device(to or source.device).type}
        if ways != {"cpu", "cuda"}:
            return
        if source.device.type == "cpu" and not source.is_pinned():
            self.note("a copy of pageable memory")
        elif not free:
            self.note("a copy that is waited for")


def where() -> str:
    """The innermost function of the package that runs, `file function`."""
    for frame, _ in traceback.walk_stack(sys._getframe(1)):
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(PACKAGE):
            return f"{file.relative_to(PACKAGE)} {frame.f_code.co_name}"
    return "outside"


# ----------------------------------------------------------------------------------- the backward


class Engine:
    """Of autograd, in Python: torch's own asks the driver for the streams of every device.

    In torch's order: by the number of a node, the latest first; gradients of weights before all.
    """

    def __init__(self) -> None:
        self.tasks, self.task = count(), -1
        self.callbacks: list[Callable[[], None]] = []

    def queue_callback(self, callback: Callable[[], None]) -> None:
        """To be called when the backward is through."""
        self.callbacks.append(callback)

    def run_backward(
        self,
        outputs: Sequence[Tensor],
        gradients: Sequence[Tensor],
        keep_graph: bool,
        create_graph: bool,
        inputs: Sequence[Tensor],
        allow_unreachable: bool,
        accumulate_grad: bool,
    ) -> tuple[Tensor | None, ...]:
        """As torch's; gradients of no gradients are not asked for."""
        assert not create_graph and accumulate_grad == (not inputs) and self.task == -1
        self.task = next(self.tasks)
        edges = [get_gradient_edge(x) for x in inputs]
        try:
            with torch.no_grad():
                got = _run([get_gradient_edge(x) for x in outputs], gradients, edges)
                while self.callbacks:
                    self.callbacks.pop(0)()
        finally:
            self.task = -1
        return tuple(got.get((edge.node, edge.output_nr)) for edge in edges)


def register_hook(tensor: Tensor, hook: Callable[[Tensor], Tensor | None]) -> None:
    """On the gradient of what an operation gave."""
    assert tensor.grad_fn is not None
    tensor.grad_fn.metadata.setdefault(HOOKS, []).append((tensor.output_nr, hook))


HOOKS = "hooks of the engine in Python"


def _run(
    roots: Sequence[GradientEdge], gradients: Sequence[Tensor], ends: Sequence[GradientEdge]
) -> dict[tuple[Node, int], Tensor]:
    """Walk the graph; the gradients at its ends, where there are any, and nothing beyond them."""
    wanted = {edge.node for edge in ends}
    waiting, useful = _graph([edge.node for edge in roots], wanted)
    got: dict[tuple[Node, int], Tensor] = {}
    held: dict[Node, list[Tensor | None]] = {}
    ready: list[tuple[int, int, Node]] = []
    ties = count()

    def arrive(node: Node, number: int, gradient: Tensor | None) -> None:
        sums = held.setdefault(node, [None] * len(node._input_metadata))
        if gradient is not None:
            like = node._input_metadata[number]
            gradient = gradient.sum_to_size(like.shape).to(like.dtype)
            before = sums[number]
            sums[number] = gradient if before is None else before + gradient
        if not waiting[node] and node in useful:
            heapq.heappush(ready, (-node._sequence_nr(), next(ties), node))

    for edge, gradient in zip(roots, gradients, strict=True):
        arrive(edge.node, edge.output_nr, gradient)
    while ready:
        node = heapq.heappop(ready)[-1]
        sums = held.pop(node)
        for number, hook in node.metadata.get(HOOKS, ()):
            if (gradient := sums[number]) is not None:
                changed = hook(gradient)
                sums[number] = gradient if changed is None else changed
        if node in wanted:
            got |= {(node, i): g for i, g in enumerate(sums) if g is not None}
            continue
        for (following, number), gradient in zip(
            node.next_functions, _gradients(node, sums), strict=True
        ):
            if following is not None:
                waiting[following] -= 1
                arrive(following, number, gradient)
    return got


def _graph(roots: Sequence[Node], wanted: set[Node]) -> tuple[Counter[Node], set[Node]]:
    """How often each node is an input's, and those on the way to what is wanted (all, for none)."""
    waiting: Counter[Node] = Counter()
    parents: dict[Node, list[Node]] = {}
    seen, stack = set(roots), list(roots)
    while stack:
        node = stack.pop()
        for following, _ in node.next_functions:
            if following is None:
                continue
            waiting[following] += 1
            parents.setdefault(following, []).append(node)
            if following not in seen:
                seen.add(following)
                stack.append(following)
    if not wanted:
        return waiting, seen
    useful, stack = set(wanted), list(wanted)
    while stack:
        for parent in parents.get(stack.pop(), ()):
            if parent not in useful:
                useful.add(parent)
                stack.append(parent)
    return waiting, useful


def _gradients(node: Node, gradients: list[Tensor | None]) -> list[Tensor | None]:
    """Of a node's tensors among its inputs."""
    run = node if not isinstance(node, BackwardCFunction) else node.apply
    given = run(*gradients)
    results = list(given) if isinstance(given, tuple) else [given]
    # A function in Python says None of what is no tensor.
    for _ in range(len(results) - len(node.next_functions)):
        results.remove(None)
    return results


# ------------------------------------------------------------------------------------- the device


class Event:
    """Of a queue that is always done."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, *args: Any) -> "Event":
        return self

    def wait(self, *args: Any) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: "Event") -> float:
        return 1.0


class Stream(nullcontext[None]):
    """The one queue."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    device, device_index, stream_id = torch.device("cuda", 0), 0, 0
    device_type = torch._C._autograd.DeviceType.CUDA

    def wait_stream(self, other: "Stream") -> None: ...

    def wait_event(self, event: Event) -> None: ...

    def record_event(self, event: Event | None = None) -> Event:
        return event or Event()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream)

    def __hash__(self) -> int:
        return 0


def pin_memory(tensor: Tensor, device: Any = None) -> Tensor:
    """A copy in memory that stays where it is."""
    if is_pinned(tensor):
        return tensor
    copied = aten.clone(tensor)
    copied.untyped_storage().is_page_locked = True
    return copied


def is_pinned(tensor: Tensor, device: Any = None) -> bool:
    return hasattr(tensor.untyped_storage(), "is_page_locked")


@contextmanager
def fake_cuda() -> Iterator[Watch]:
    """The package finds one GPU, on which whatever is put there is to be fake; what it waits for.

    Takes the process: torch's guard of CUDA devices is gone from it.
    """
    watch, engine, cuda = Watch(), Engine(), torch.cuda

    def waits(what: str) -> Callable[..., None]:
        return lambda *_, **__: watch.note(what)

    def is_available() -> bool:
        # A fake mode that heard of a GPU would use it.
        return sys._getframe(1).f_globals["__name__"].startswith("senseflow")

    changed: dict[Any, dict[str, Any]] = {
        cuda: {
            "is_available": is_available,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "set_device": lambda _: None,
            "get_device_capability": lambda _=None: (9, 0),
            "_lazy_init": lambda: None,
            "Event": Event,
            "Stream": Stream,
            "stream": lambda _: nullcontext(),
            "current_stream": lambda _=None: Stream(),
            "default_stream": lambda _=None: Stream(),
            "synchronize": waits("cuda.synchronize"),
        },
        Event: {"synchronize": waits("Event.synchronize")},
        Stream: {"synchronize": waits("Stream.synchronize")},
        Tensor: {
            "pin_memory": pin_memory,
            "is_pinned": is_pinned,
            "register_hook": register_hook,
        },
        Variable: {"_execution_engine": engine},
        torch._C: {"_current_graph_task_id": lambda: engine.task},
    }
    with ExitStack() as stack:
        for target, functions in changed.items():
            for name, function in functions.items():
                stack.enter_context(patch.object(target, name, function, create=True))
        yield watch
