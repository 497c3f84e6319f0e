"""What `python -m senseflow.plan` says: of one configuration, or a table of all recipes."""

import json
from collections.abc import Sequence
from dataclasses import replace

from senseflow.common.quiet import quiet_libraries
from senseflow.common.templates import markdown_table
from senseflow.plan.costs import Gpu, flops, seconds
from senseflow.plan.fit import fit
from senseflow.plan.host import Constants, measure
from senseflow.plan.plan import Plan, Wanted, make_plan
from senseflow.plan.rehearsal import Kind
from senseflow.plan.remedies import remedies
from senseflow.plan.text import as_markdown, as_tree, fit_as_markdown, fit_as_tree, gib

GPU_COUNTS = (1, 2, 4, 8, 16)


def whole_plan(wanted: Wanted, gpu: Gpu, host: Constants, as_json: bool) -> str:
    """The text of a plan, with what would make it fit if it does not."""
    quiet_libraries()
    plan = make_plan(wanted)
    costs = measure(*host)
    helps = [] if plan.fits(gpu) else remedies(plan, gpu)
    if as_json:
        return json.dumps(as_tree(plan, gpu, costs, helps), indent=2) + "\n"
    return as_markdown(plan, gpu, costs, helps)


def whole_fit(wanted: Wanted, gpu: Gpu, host: Constants, as_json: bool) -> tuple[str, bool]:
    """The changes with which it fits, then the plan with them; whether there are any such."""
    quiet_libraries()
    found, costs = fit(wanted, gpu), measure(*host)
    fits = found.plan.fits(gpu)
    if as_json:
        tree = as_tree(found.plan, gpu, costs, []) | {"fit": fit_as_tree(found, gpu)}
        return json.dumps(tree, indent=2) + "\n", fits
    return fit_as_markdown(found, gpu) + as_markdown(found.plan, gpu, costs, []), fits


def whole_table(wanted: list[Wanted], gpu: Gpu) -> str:
    """Peaks, TFLOP and times by number of GPUs, one sample on each."""
    quiet_libraries()
    rows = []
    for one in wanted:
        first = one_sample_each(one, GPU_COUNTS[0])
        mean = first.costs.mean(flops)  # a sample costs the same wherever it is
        rows.append(row(first, mean, gpu))
        worst = [first.costs.worst()]  # a generator turn: sharded or not, it has every phase
        rows += [row(one_sample_each(one, n, worst), mean, gpu) for n in GPU_COUNTS[1:]]
    heads = ["recipe", "GPUs", "peak, GiB per GPU", f"fits {gpu.memory:g}", "worst iteration"]
    heads += ["TFLOP per iteration and GPU", f"seconds on H100 at {gpu.mfu:.0%}"]
    return markdown_table(heads, rows)


def one_sample_each(wanted: Wanted, count: int, kinds: Sequence[Kind] | None = None) -> Plan:
    """The plan of a recipe on so many GPUs, at most 8 on a node; `kinds`: these alone."""
    nodes = max(1, count // 8)
    batch = [f"train.batch_size={count}", "train.grad_accumulation=1"]
    overrides = (*wanted.overrides, *batch)
    return make_plan(replace(wanted, overrides=overrides, nodes=nodes, gpus=count // nodes), kinds)


def row(plan: Plan, mean: float, gpu: Gpu) -> list[str]:
    """One line of the table; mean: FLOPs of an iteration."""
    return [
        plan.config.recipe,
        str(plan.wanted.world_size),
        gib(plan.peak),
        "yes" if plan.fits(gpu) else "no",
        str(plan.costs.worst()),
        f"{mean / 1e12:.1f}",
        f"{seconds(mean, 'H100', gpu.mfu):.2f}",
    ]
