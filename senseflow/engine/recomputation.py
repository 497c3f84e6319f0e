"""Selective recomputation of a block, whole operations at a time: no product is run twice.

A block's first run drops what autograd would save for the way back, and keeps what its products
gave: linear layers, convolutions, attention. On the way back the block's own forward runs again,
up to the last dropped tensor; a product in it says what it saves, and gives what it gave. Torch's
selective checkpointing does the same from inside a dispatch mode, Python around every operation,
which costs the host more than the operations; here Python is met once per product and once per
saved tensor (`torch.autograd.graph.saved_tensors_hooks`). Under torch.compile torch's own is used.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from senseflow.weights.packed import PackedLinear

Contexts = Callable[[], tuple[Any, Any]]  # of a block's first run and of its second

PRODUCTS = (nn.Linear, PackedLinear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
ATTENTION = F.scaled_dot_product_attention


class _Running(threading.local):
    """The runs that a thread is in: autograd has threads of its own."""

    run: "Run | None" = None


RUNNING = _Running()


class _Saved(Exception):
    """Thrown out of a second run when it has saved what it was run for."""


@dataclass(frozen=True, slots=True)
class Product:
    """What a product gave, and which saved tensors it accounts for."""

    output: Tensor
    learns: bool
    version: int  # of the output: it must not be written to
    last: int | None  # that it dropped; None: it has dropped none
    end: int  # the number of the first saved tensor after it


@dataclass(slots=True)
class Run:
    """One call of a block: its inputs, what its products gave, and what was dropped."""

    forward: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    context: Any  # of a second run
    products: list[Product] = field(default_factory=list)
    dropped: set[int] = field(default_factory=set)
    number: int = 0  # of the next saved tensor
    given: set[int] | None = None  # storages that the product which runs was given
    last: int | None = None  # dropped by the product that runs
    made: dict[int, Tensor] | None = None  # by a second run, until it is asked for
    again: Iterator[Product] | None = None  # in a second run
    end: int = -1  # the number at which it ends

    def first(self) -> Any:
        """The block's output."""
        with saved_tensors_hooks(self._drop, self._make), _within(self):
            return self.forward(*self.args, **self.kwargs)

    def product(self, compute: Callable[..., Tensor], args: Any, kwargs: Any) -> Tensor:
        """What a product gives: computed in the first run, remembered in the second."""
        if self.again is not None:
            return self._remembered(next(self.again), compute, args, kwargs)
        given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        self.given, self.last = {_storage(x) for x in given}, None
        output = compute(*args, **kwargs)
        self.given = None
        kept = output.detach()
        found = Product(kept, output.requires_grad, kept._version, self.last, self.number)
        self.products.append(found)
        return output

    def _drop(self, tensor: Tensor) -> Any:
        """In the first run, of a tensor that is to be saved: a stand-in, or the tensor itself where
        a product made it, or holds it as its weight."""
        number = self.number
        self.number += 1
        if self.given is not None:
            if _storage(tensor) not in self.given:
                return tensor.detach()
            self.last = number
        self.dropped.add(number)
        return self, number

    @staticmethod
    def _make(saved: Any) -> Tensor:
        """On the way back: the tensor itself. The first one that was dropped makes them all."""
        if isinstance(saved, Tensor):
            return saved
        run, number = saved
        if run.made is None or number not in run.made:
            run._second()
        tensor: Tensor = run.made.pop(number)
        return tensor

    def _second(self) -> None:
        self.made, self.number, self.again = {}, 0, iter(self.products)
        self.last, self.end = None, max(self.dropped)
        with (
            torch.enable_grad(),
            self.context,
            saved_tensors_hooks(self._keep, self._make),
            _within(self),
            suppress(_Saved),
        ):
            self.forward(*self.args, **self.kwargs)
        assert self.made.keys() == self.dropped, "a block's second run was not its first"
        self.again = None

    def _keep(self, tensor: Tensor) -> None:
        """In a second run, of a tensor that is saved."""
        assert self.made is not None
        number = self.number
        self.number += 1
        if number in self.dropped:
            self.made[number] = tensor.detach()
        if number in (self.end, self.last):
            raise _Saved

    def _remembered(self, product: Product, compute: Any, args: Any, kwargs: Any) -> Tensor:
        if product.last is not None:
            self.last = product.last
            try:
                # Inputs are saved before anything is computed, and that is where it ends.
                compute(*args, **kwargs)
            except _Saved:
                if self.number > self.end:
                    raise
            self.last = None
        assert product.output._version == product.version, "a product was written to"
        self.number = product.end
        return product.output.detach().requires_grad_(product.learns)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


@contextmanager
def _within(run: Run) -> Iterator[None]:
    """While a block runs, attention is one of its products, whoever calls it."""
    before, RUNNING.run = RUNNING.run, run
    F.scaled_dot_product_attention = _attention
    try:
        yield
    finally:
        RUNNING.run = before
        if before is None:
            F.scaled_dot_product_attention = ATTENTION


def _attention(*args: Any, **kwargs: Any) -> Tensor:
    return _product(ATTENTION, *args, **kwargs)


def _product(compute: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    run = RUNNING.run
    return run.product(compute, args, kwargs) if run else compute(*args, **kwargs)


def spare_products(block: nn.Module, contexts: Contexts) -> None:
    """Make a block drop all but what its products give, and run again without them.

    contexts: made at each first run, the contexts of that run and of the second. The gradients are
    the same to the bit. Nothing random may be drawn in the block, nor a product's output be written
    to.
    """
    layers: list[nn.Module] = [m for m in block.modules() if isinstance(m, PRODUCTS)]
    for layer in layers:
        layer.forward = partial(_product, layer.forward)
    forward = block.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        first, second = contexts()
        with first:
            return Run(forward, args, kwargs, second).first()

    block.forward = run
