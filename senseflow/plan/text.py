"""A plan in words: markdown for people, a tree for programs."""

from typing import Any

from senseflow.plan.costs import (
    DENSE_TFLOPS,
    GIB,
    Gpu,
    Phases,
    flops,
    peak,
    seconds,
    sent,
    work_of,
)
from senseflow.plan.plan import Plan
from senseflow.plan.remedies import Remedy
from senseflow.plan.tracker import COLLECTIVES, KINDS

ORDER = ("generate", "generator", "fake_score", "discriminator", "optimizer")


def gib(num_bytes: float) -> str:
    """GiB with two digits; a dash for nothing."""
    return f"{num_bytes / GIB:.2f}" if num_bytes else "-"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """A table of markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(line)} |" for line in lines] + [""]


def as_markdown(plan: Plan, gpu: Gpu, remedies: list[Remedy]) -> str:
    """All of a plan."""
    train, wanted = plan.config.train, plan.wanted
    micro = train.batch_size // (wanted.world_size * train.grad_accumulation)
    lines = [
        f"# Plan of {plan.config.recipe} on {wanted.nodes} x {wanted.gpus} GPUs",
        "",
        f"Teacher: {plan.teacher}. Data: {plan.data}. {train.resolution[0]} x "
        f"{train.resolution[1]} pixels, global batch {train.batch_size}: {micro} per GPU, "
        f"{train.grad_accumulation} times an iteration. Sizes are GiB on each GPU.",
        "",
        *verdict(plan, gpu, remedies),
        "## What stays",
        "",
        *networks_table(plan),
        *phases_section(plan),
        *kinds_section(plan),
        *work_section(plan),
        *time_section(plan, gpu.mfu),
    ]
    return "\n".join(lines)


def verdict(plan: Plan, gpu: Gpu, remedies: list[Remedy]) -> list[str]:
    """Whether it fits, and if not, what helps by how much."""
    over = (plan.peak - gpu.room) / GIB
    worst = plan.costs.worst()
    said = f"**It fits**, with {-over:.1f} to spare" if over <= 0 else f"**{over:.1f} too much**"
    lines = [
        f"{said}: the worst iteration ({worst}) needs {gib(plan.peak)}; {gpu.room / GIB:.1f} of "
        f"{gpu.memory:g} are for tensors, {gpu.reserve:g} are kept for the CUDA context, NCCL and "
        "fragmentation.",
        "",
    ]
    if remedies:
        rows = []
        for remedy in remedies:
            fits = "yes" if remedy.peak <= gpu.room else "no"
            rows.append([remedy.words, f"`{' '.join(remedy.overrides)}`", gib(remedy.peak), fits])
        lines += ["What changes it, each traced again:", ""]
        lines += table(["change", "override", "peak", "fits"], rows)
    return lines


def networks_table(plan: Plan) -> list[str]:
    """Parameters, gradients, optimizer states and average of each network."""
    rows = []
    for name, held in plan.networks.items():
        dtypes = ", ".join(f"{gib(size)} {dtype}" for dtype, size in held.parameters.items())
        own = [gib(held.gradients), gib(held.states), gib(held.average)]
        rows.append([name, f"{held.numel:,}", dtypes or "shared", *own])
    head = ["network", "parameters", "held here", "gradients", "optimizer states", "EMA"]
    return table(head, rows)


def phases_section(plan: Plan) -> list[str]:
    """The worst iteration, phase by phase."""
    worst = plan.costs.worst()
    phases = plan.costs.traced[worst]
    names = [name for name in (*ORDER, "between") if name in phases]
    kinds = [kind for kind in KINDS if any(phases[n].parts.get(kind) for n in names)]
    peaks, work = [], []
    for name in names:
        cost = phases[name]
        parts = [gib(cost.parts.get(kind, 0)) for kind in kinds]
        peaks.append([name, gib(cost.peak), *parts])
        talk = [f"{gib(cost.sent[c])} in {cost.calls[c]}" for c in COLLECTIVES]
        work.append([name, f"{cost.flops / 1e12:.2f}", *talk])
    return [
        f"## The worst iteration: {worst}",
        "",
        "The highest moment of each phase, and what it consists of:",
        "",
        *table(["phase", "peak", *kinds], peaks),
        "Work and communication; the bytes are those of the whole tensors gathered or reduced, "
        "in so many calls:",
        "",
        *table(["phase", "TFLOP", *COLLECTIVES], work),
    ]


def kinds_section(plan: Plan) -> list[str]:
    """Every iteration that was traced."""
    rows = []
    for kind, phases in plan.costs.traced.items():
        whole = sum(cost.flops for cost in phases.values())
        rows.append([str(kind), gib(peak(phases)), highest(phases), f"{whole / 1e12:.2f}"])
    return ["## All kinds", "", *table(["iteration", "peak", "in", "TFLOP per GPU"], rows)]


def highest(phases: Phases) -> str:
    """The phase in which the peak lies."""
    return max(phases, key=lambda name: phases[name].peak)


def work_section(plan: Plan) -> list[str]:
    """TFLOP of the mean iteration by network, the most first."""
    mean = mean_work(plan)
    rows = [
        [name, f"{done / 1e12:.2f}", f"{done / sum(mean.values()):.1%}"]
        for name, done in sorted(mean.items(), key=lambda pair: -pair[1])
    ]
    return [
        "## Where the work is",
        "",
        "TFLOP of the mean iteration: the forwards of each network, and the backward of each phase "
        "with what is recomputed in it:",
        "",
        *table(["", "TFLOP", "share"], rows),
    ]


def mean_work(plan: Plan) -> dict[str, float]:
    """FLOPs of the mean iteration by what does them."""
    iterations = plan.costs.traced.values()
    names = {name for phases in iterations for cost in phases.values() for name in cost.work}
    return {name: plan.costs.mean(work_of(name)) for name in sorted(names)}


def time_section(plan: Plan, mfu: float) -> list[str]:
    """TFLOP and seconds of the mean iteration, hours of the run."""
    mean, train = plan.costs.mean(flops), plan.config.train
    samples = train.batch_size / plan.wanted.world_size
    talk = ", ".join(f"{plan.costs.mean(sent(c)) / GIB:.1f} GiB {c}" for c in COLLECTIVES)
    rows = []
    for gpu, tflops in DENSE_TFLOPS.items():
        each = seconds(mean, gpu, mfu)
        rows.append([gpu, str(tflops), f"{each:.2f}", f"{each * train.iter_num / 3600:.1f}"])
    return [
        "## Time",
        "",
        "The mean iteration (generator turns, anchors and simulation as the recipe draws them) "
        f"takes {mean / 1e12:.1f} TFLOP per GPU, {mean / samples / 1e12:.1f} per sample, and moves "
        f"{talk}. "
        f"At {mfu:.0%} of the dense bfloat16 peak, without waiting for communication or data:",
        "",
        *table(
            ["GPU", "peak TFLOP/s", "seconds per iteration", f"hours for {train.iter_num:,}"], rows
        ),
    ]


def as_tree(plan: Plan, gpu: Gpu, remedies: list[Remedy]) -> dict[str, Any]:
    """All of a plan for programs; sizes are bytes."""
    mean = plan.costs.mean(flops)
    return {
        "recipe": plan.config.recipe,
        "nodes": plan.wanted.nodes,
        "gpus": plan.wanted.gpus,
        "overrides": list(plan.wanted.overrides),
        "teacher": plan.teacher,
        "data": plan.data,
        "fits": plan.peak <= gpu.room,
        "peak": plan.peak,
        "worst": str(plan.costs.worst()),
        "networks": {name: vars(held) for name, held in plan.networks.items()},
        "iterations": {
            str(kind): {name: vars(cost) for name, cost in phases.items()}
            for kind, phases in plan.costs.traced.items()
        },
        "mean_flop": mean,
        "mean_work": mean_work(plan),
        "mean_sent": {c: plan.costs.mean(sent(c)) for c in COLLECTIVES},
        "time_s": {name: seconds(mean, name, gpu.mfu) for name in DENSE_TFLOPS},
        "remedies": [vars(remedy) for remedy in remedies],
    }
