"""What a step of AdamW costs for each element, for every type of masters and moments.

    python -m benchmarks.optimizer_time [--device cuda] [--elements N] [--output FILE.md]

Nanoseconds on one thread's CPU time, or on a GPU by its clock, the best of three steps after the
first; and bytes that are read and written, the same everywhere: each operation's tensors, views
apart, and for what torch.compile joins the tensors that enter and leave. The first row is torch's
own fused AdamW, on float32.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from senseflow.common.commands import number
from senseflow.common.fields import Count
from senseflow.optim.compact_adamw import CompactAdamW

KINDS = [(m, s) for m in (torch.float32, torch.bfloat16) for s in ("float32", "bfloat16", "8bit")]
VIEWS = {"alias", "detach", "select", "slice", "split", "split_with_sizes", "unsqueeze", "view"}


def tensors(*trees: Any) -> dict[int, int]:
    """Bytes of the tensors in some arguments by where they begin, each memory once."""
    leaves = [leaf for leaf in tree_leaves(trees) if isinstance(leaf, Tensor)]
    return {leaf.data_ptr(): leaf.nbytes for leaf in leaves}


class Bytes(TorchDispatchMode):
    """Bytes that operations read and write while this lasts."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name not in VIEWS:
            read = args[1:] if name == "_foreach_copy_" else args
            self.total += sum(tensors(read, kwargs).values())
            self.total += sum(written(name, args, out))
        return out

    def joined(self, function: Callable[..., Any], *args: Any) -> Any:
        """A call whose insides cost nothing."""
        with _disable_current_modes():
            out = function(*args)
        read = tensors(args)
        self.total += sum(read.values())
        self.total += sum(num for at, num in tensors(out).items() if at not in read)
        return out


def written(name: str, args: Any, out: Any) -> list[int]:
    """Bytes of what an operation writes: what it returns, or what it changes in place."""
    if name == "_fused_adamw_":  # weights and both moments, not the gradients
        return [*tensors(args[0], args[2], args[3]).values()]
    if name.startswith("_foreach") and name.endswith("_"):
        return [*tensors(args[0]).values()]
    return [*tensors(out).values()]


def give_gradient(parameter: nn.Parameter) -> None:
    generator = torch.Generator(parameter.device).manual_seed(0)
    parameter.grad = torch.randn(parameter.shape, generator=generator, device=parameter.device).to(
        parameter.dtype
    )


def optimizer_of(kind: tuple[torch.dtype, str], compiled: bool, device: str, num: int) -> Any:
    weight = nn.Parameter(torch.ones(num // 64, 64, dtype=kind[0], device=device))
    give_gradient(weight)
    return CompactAdamW([weight], kind[1], compiled, lr=1e-3)


def bytes_of(optimizer: Any, joined: bool) -> int:
    """Of one step; joined: what torch.compile makes one passes over its tensors once."""
    optimizer.step()
    with Bytes() as count:
        if joined:
            for name in ("_in_float32", "_rounded"):
                setattr(optimizer, name, partial(count.joined, getattr(optimizer, name)))
        optimizer.step()
    return count.total


def seconds_of(step: Callable[[], None], device: str) -> float:
    """The best of three steps after the first, which compiles."""
    step()
    best = float("inf")
    for _ in range(3):
        if device == "cpu":
            began = time.process_time()
            step()
            best = min(best, time.process_time() - began)
        else:
            torch.cuda.synchronize()
            began = time.perf_counter()
            step()
            torch.cuda.synchronize()
            best = min(best, time.perf_counter() - began)
    return best


def rows(device: str, num: int) -> list[str]:
    """The lines of the table."""
    weight = nn.Parameter(torch.ones(num // 64, 64, device=device))
    give_gradient(weight)
    plain = torch.optim.AdamW([weight], fused=True)
    bare = (
        f"{seconds_of(plain.step, device) / num * 1e9:.2f} | | {bytes_of(plain, False) / num:.0f}"
    )
    lines = [f"| float32 | float32, torch's own | {bare} | |"]
    for kind in KINDS[1:]:
        cells = []
        for compiled in (False, True):
            step = optimizer_of(kind, compiled, device, num).step
            cells.append(f"{seconds_of(step, device) / num * 1e9:.2f}")
        for joined in (False, True):
            cells.append(f"{bytes_of(optimizer_of(kind, False, device, num), joined) / num:.0f}")
        masters = str(kind[0]).removeprefix("torch.")
        lines.append(f"| {masters} | {kind[1]} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--elements", type=number(Count), default=2**22, help="of the weight, times of 64"
    )
    parser.add_argument("--output", type=Path, help="markdown file to write the table to")
    args = parser.parse_args()
    torch.set_num_threads(1)
    head = [
        "| masters | moments | ns per element | compiled | bytes per element | compiled |",
        "|---|---|---|---|---|---|",
    ]
    text = "\n".join([*head, *rows(args.device, args.elements), ""])
    print(text)
    if args.output:
        args.output.write_text(text)


if __name__ == "__main__":
    main()
