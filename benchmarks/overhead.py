"""CPU seconds of an iteration, in its networks and outside of them.

    python -m benchmarks.overhead --config configs/FLUX/flux_senseflow_tiny.yaml \\
        paths.dataset=DATA.json train.batch_size=8 train.resolution=64 [key.sub=value ...]

One process, one thread, its own CPU time (other programs on the machine do not enter), real data
and whole iterations as the training loop runs them, without files. Inside are the forwards of all
networks, every backward, the steps of the optimizers with their clipping, IDA and the EMA; outside
is all else: taking a batch from the loader, tokenizers, random draws, noising, guidance, losses,
augmentation and measures. The iterations of one TTUR cycle warm up.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from tqdm import trange

from senseflow.common.commands import number
from senseflow.common.fields import Count
from senseflow.config.config import load_config
from senseflow.config.recipes import RECIPES
from senseflow.distill import algorithm as distill
from senseflow.engine.build import prepare
from senseflow.engine.inputs import read_run
from senseflow.engine.loop import Run
from senseflow.optim.ema import Ema
from senseflow.optim.trained import Trained
from senseflow.plan.rehearsal import watching

GOAL = 0.03


@dataclass
class Inside:
    """CPU seconds between entering and leaving the work that counts, the outermost alone."""

    seconds: float = 0.0
    depth: int = 0
    began: float = field(default=0.0, repr=False)

    def enter(self, *_: Any) -> None:
        if self.depth == 0:
            self.began = time.process_time()
        self.depth += 1

    def leave(self, *_: Any) -> None:
        self.depth -= 1
        if self.depth == 0:
            self.seconds += time.process_time() - self.began

    def around(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, counted."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.enter()
            try:
                return work(*args, **kwargs)
            finally:
                self.leave()

        return counted


class Callers(list):
    """What `watching` tells of networks whose forward begins and ends."""

    def __init__(self, inside: Inside) -> None:
        super().__init__()
        self.inside = inside

    def append(self, name: str) -> None:
        self.inside.enter()

    def pop(self, *_: Any) -> None:
        self.inside.leave()


@contextmanager
def counted(run: Run) -> Iterator[Inside]:
    """Count the work inside while this lasts."""
    inside = Inside()
    with ExitStack() as stack:
        stack.enter_context(watching(run.parts, Callers(inside)))
        for owner, name in (
            (torch.Tensor, "backward"),
            (torch.autograd, "grad"),
            (Trained, "step"),
            (distill, "align"),
            (Ema, "update"),
        ):
            stack.enter_context(patch.object(owner, name, inside.around(getattr(owner, name))))
        yield inside


def measure(run: Run, cycles: int) -> tuple[float, float]:
    """CPU seconds per iteration, in all and outside of the networks, over whole TTUR cycles."""
    ttur = run.config.fake_score.ttur
    # A thread would draw while networks work, and its seconds would count as theirs.
    run.parts = replace(run.parts, foresight=None)
    data = run.data(1)
    for iteration in range(1, ttur + 1):
        run.iterate(data, iteration)
    num = cycles * ttur
    with counted(run) as inside:
        began = time.process_time()
        for iteration in trange(ttur + 1, ttur + 1 + num, unit="it"):
            run.iterate(data, iteration)
        run.measures.read(run.ranks)
        seconds = time.process_time() - began
    return seconds / num, (seconds - inside.seconds) / num


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="YAML of a recipe")
    parser.add_argument("--cycles", type=number(Count), default=4, help="of N iterations each")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(args.config, args.overrides)
        run = prepare(read_run(config, RECIPES[config.recipe].family), Path(folder))
        seconds, outside = measure(run, args.cycles)
    print(
        f"{config.recipe}, batch {config.train.batch_size}: {seconds:.3f} CPU s per iteration, "
        f"{outside:.4f} outside the networks: {outside / seconds:.2%} (at most {GOAL:.0%})"
    )


if __name__ == "__main__":
    main()
