"""Seconds, MFU and peak memory of whole iterations with random weights, on the device at hand.

    python -m benchmarks.step --config configs/FLUX/flux_senseflow_lora.yaml --data cached \\
        train.batch_size=1 train.grad_accumulation=1
    torchrun --nproc-per-node 8 -m benchmarks.step --config configs/FLUX/flux_senseflow.yaml

The networks are those of the configuration, at full size where `paths.pretrained_model` is not
there (`senseflow.plan`), built, sharded and stepped by the run's own code; the sample is blank.
The kinds of iterations that `python -m senseflow.plan` traces are run, one warm-up and --repeats
each; the mean weighs all kinds as the recipe draws them. FLOPs are torch's own count of the same
iterations; MFU is of the GPU's dense bfloat16 peak. On a CPU seconds are the process's own.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from senseflow.common.commands import number
from senseflow.common.fields import Count
from senseflow.common.quiet import quiet_libraries
from senseflow.common.ranks import Ranks, join_group, start_ranks
from senseflow.common.templates import markdown_table
from senseflow.config.config import load_config
from senseflow.config.recipes import RECIPES
from senseflow.data.sampler import Batch, batches
from senseflow.distill import algorithm as distill
from senseflow.distill.measures import STOPWATCH, Measures
from senseflow.distill.state import Distillation
from senseflow.engine.build import assemble, share
from senseflow.plan.blank import blank_inputs
from senseflow.plan.costs import DENSE_TFLOPS, Costs, kinds_of
from senseflow.plan.plan import Wanted, configure
from senseflow.plan.rehearsal import Kind, silent_anchors
from senseflow.weights.lora import Role

GIB = 2**30


@dataclass
class Phase:
    """One phase of one kind of iteration."""

    flops: int = 0
    seconds: float = 0.0  # the mean over repeats
    peak: int = 0  # bytes allocated at its highest moment


@dataclass
class Watch:
    """What the phases of an iteration count and hold while they run."""

    counter: FlopCounterMode | None = None
    phases: dict[str, Phase] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        phase = self.phases.setdefault(name, Phase())
        before = self.counter.get_total_flops() if self.counter else 0
        began, on_gpu = time.process_time(), torch.cuda.is_available()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if on_gpu else []
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            events[0].record()
        yield
        if on_gpu:
            events[1].record()
            phase.peak = max(phase.peak, torch.cuda.max_memory_allocated())
            torch.cuda.synchronize()
        if self.counter:
            phase.flops += self.counter.get_total_flops() - before
        elif on_gpu:
            phase.seconds += events[0].elapsed_time(events[1]) / 1000
        else:
            phase.seconds += time.process_time() - began


def run(d: Distillation, micro_batches: list[Batch], kind: Kind, repeats: int) -> dict[str, Phase]:
    """One kind of iteration: counted once, which also warms up, then timed."""
    turn, watch = kind.turn(d), Watch()
    with patch.object(STOPWATCH, "measure", watch):
        with FlopCounterMode(display=False) as watch.counter:
            distill.take_turn(d, turn, micro_batches, Measures())
        watch.counter = None
        for _ in range(repeats):
            distill.take_turn(d, turn, micro_batches, Measures())
    for phase in watch.phases.values():
        phase.seconds /= repeats
    return watch.phases


@torch.no_grad()
def randomise(network: nn.Module) -> None:
    """Weights of normal size: norms 1, biases 0, matrices so that variance is kept."""
    for name, parameter in network.named_parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if parameter.ndim > 1:
            local.normal_(std=parameter[0].numel() ** -0.5)
        else:
            local.fill_(float("norm" in name and name.endswith("weight")))


def parts_of(args: argparse.Namespace, ranks: Ranks) -> tuple[Distillation, list[Batch]]:
    """The run and its first micro-batches."""
    overrides = tuple(args.overrides)
    recipe = RECIPES[load_config(args.config, args.overrides).recipe]
    data = args.data or recipe.family.data
    with tempfile.TemporaryDirectory(prefix="senseflow_step_") as folder:
        wanted = Wanted(args.config, overrides, 1, ranks.world_size, data)
        config, _ = configure(recipe, wanted, Path(folder))
        inputs = blank_inputs(config, recipe.family, data)
        d = assemble(inputs, ranks, {})
    teacher = d.teacher.base.network if isinstance(d.teacher, Role) else d.teacher
    for network in {teacher, d.generator.network, d.fake_score.network}:
        randomise(network)
    loader = batches(inputs.data, share(config, ranks), num_workers=0, pin_memory=False, start=1)
    return d, next(loader)


def report(d: Distillation, measured: dict[Kind, dict[str, Phase]], world_size: int) -> str:
    """The tables, in markdown."""
    on_gpu = d.device.type == "cuda"
    card = torch.cuda.get_device_name() if on_gpu else "CPU, one thread, process time"
    rows = []
    for kind, phases in measured.items():
        for name, phase in phases.items():
            peak = f"{phase.peak / GIB:.2f}" if on_gpu else ""
            rows.append(
                [str(kind), name, f"{phase.seconds:.3f}", f"{phase.flops / 1e12:.3g}", peak]
            )
    costs = Costs(d.config, measured, silent_anchors(d))
    seconds, flops = costs.mean(lambda p: p.seconds), costs.mean(lambda p: p.flops)
    each = d.config.train.batch_size / seconds
    lines = [
        f"{d.config.recipe} on {world_size} x {card}, batch {d.config.train.batch_size}: "
        f"{seconds:.3f} s per mean iteration, {each:.3f} images/s, {flops / 1e12:.3g} TFLOP per "
        f"process, {flops / seconds / 1e12:.3g} TFLOP/s"
    ]
    if peak := next((v for k, v in DENSE_TFLOPS.items() if k in card), None):
        lines[0] += f", MFU {flops / seconds / 1e12 / peak:.1%} of {peak}"
    head = ["iteration", "phase", "seconds", "TFLOP", "peak GiB"]
    return "\n".join([*lines, "", markdown_table(head, rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, type=Path, help="YAML of a recipe")
    parser.add_argument("--data", choices=("images", "latents", "cached"), help="as senseflow.plan")
    parser.add_argument("--repeats", type=number(Count), default=3, help="of each kind, timed (3)")
    parser.add_argument("--output", type=Path, help="markdown file to write to")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    args = parser.parse_args()
    quiet_libraries()
    join_group()
    ranks = start_ranks(load_config(args.config, args.overrides).parallel.replicas)
    d, micro_batches = parts_of(args, ranks)
    measured = {}
    for kind in tqdm(kinds_of(d.config, silent_anchors(d)), unit="kind", disable=not ranks.is_main):
        measured[kind] = run(d, micro_batches, kind, args.repeats)
    if ranks.is_main:
        text = report(d, measured, ranks.world_size)
        print(text)
        if args.output:
            args.output.write_text(text)


if __name__ == "__main__":
    main()
