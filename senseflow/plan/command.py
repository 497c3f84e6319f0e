"""What `python -m senseflow.plan` does, behind its flags."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from senseflow.common.files import ROOT
from senseflow.common.quiet import quiet_libraries
from senseflow.config.recipes import RECIPES
from senseflow.plan.costs import flops, seconds
from senseflow.plan.plan import Plan, Wanted, make_plan
from senseflow.plan.rehearsal import Kind
from senseflow.plan.remedies import remedies
from senseflow.plan.text import GIB, as_markdown, as_tree, gib, table

GPU_COUNTS = (1, 2, 4, 8, 16)


def run(args: argparse.Namespace) -> str:
    """The text of a plan or of the table; args: see `senseflow.plan`."""
    quiet_libraries()
    if args.table:
        return whole_table(args)
    plan = make_plan(Wanted(args.config, tuple(args.overrides), args.nodes, args.gpus, args.data))
    room = (args.memory - args.reserve) * GIB
    helps = remedies(plan, room) if plan.peak > room else []
    if args.output and args.output.suffix == ".json":
        tree = as_tree(plan, args.memory, args.reserve, args.mfu, helps)
        return json.dumps(tree, indent=2) + "\n"
    return as_markdown(plan, args.memory, args.reserve, args.mfu, helps)


def whole_table(args: argparse.Namespace) -> str:
    """Peaks, TFLOP and times of the recipes by number of GPUs, one sample on each."""
    files = [args.config] if args.config else [ROOT / r.config for r in RECIPES.values()]
    rows = []
    for file in files:
        first = one_sample_each(file, GPU_COUNTS[0], args)
        mean = first.costs.mean(flops)  # a sample costs the same wherever it is
        rows.append(row(first, mean, args))
        worst = [first.costs.worst()]  # a generator turn: sharded or not, it has every phase
        for count in GPU_COUNTS[1:]:
            rows.append(row(one_sample_each(file, count, args, worst), mean, args))
    head = ["recipe", "GPUs", "peak, GiB per GPU", f"fits {args.memory:g}", "worst iteration"]
    head += ["TFLOP per iteration and GPU", f"seconds on H100 at {args.mfu:.0%}"]
    return "\n".join(table(head, rows))


def one_sample_each(
    file: Path, count: int, args: argparse.Namespace, kinds: Sequence[Kind] | None = None
) -> Plan:
    """The plan of a recipe on so many GPUs, at most 8 on a node; `kinds`: these alone."""
    nodes = max(1, count // 8)
    batch = [f"train.batch_size={count}", "train.grad_accumulation=1"]
    overrides = (*args.overrides, *batch)
    return make_plan(Wanted(file, overrides, nodes, count // nodes, args.data), kinds)


def row(plan: Plan, mean: float, args: argparse.Namespace) -> list[str]:
    """One line of the table; mean: FLOPs of an iteration."""
    fits = plan.peak <= (args.memory - args.reserve) * GIB
    return [
        plan.config.recipe,
        str(plan.wanted.world_size),
        gib(plan.peak),
        "yes" if fits else "no",
        str(plan.costs.worst()),
        f"{mean / 1e12:.1f}",
        f"{seconds(mean, 'H100', args.mfu):.2f}",
    ]
