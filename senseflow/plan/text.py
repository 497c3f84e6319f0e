"""A plan in words: Markdown for people (`plan.md.j2`), a tree for programs."""

import math
import shlex
from pathlib import Path
from typing import Any

from senseflow.common.templates import templates
from senseflow.plan.costs import DENSE_TFLOPS, GIB, Gpu, flops, peak, seconds, sent, work_of
from senseflow.plan.fit import Changes, Fit
from senseflow.plan.host import Host
from senseflow.plan.plan import Plan
from senseflow.plan.remedies import Remedy, together
from senseflow.plan.tracker import COLLECTIVES, KINDS

ORDER = ("rollout", "reward", "generate", "generator", "fake_score", "discriminator", "optimizer")
Rows = list[list[str]]


def gib(num_bytes: float) -> str:
    """GiB with two digits; a dash for nothing."""
    return f"{num_bytes / GIB:.2f}" if num_bytes else "-"


def tera(num_flops: float) -> str:
    """TFLOP with two digits."""
    return f"{num_flops / 1e12:.2f}"


def as_markdown(plan: Plan, gpu: Gpu, host: Host, remedies: list[Remedy]) -> str:
    """All of a plan."""
    train, wanted, costs = plan.config.train, plan.wanted, plan.costs
    worst, mean = costs.worst(), costs.mean(flops)
    phases = {name: costs.traced[worst][name] for name in (*ORDER, "between")
              if name in costs.traced[worst]}  # fmt: skip
    kinds = [kind for kind in KINDS if any(cost.parts.get(kind) for cost in phases.values())]
    template = templates(Path(__file__).parent).get_template("plan.md.j2")
    return template.render(
            plan=plan,
            gpu=gpu,
            gib=gib,
            train=train,
            micro=train.batch_size // (wanted.world_size * train.grad_accumulation),
            samples=train.batch_size / wanted.world_size,
            reserve=plan.reserve(gpu),
            spare=plan.spare(gpu) / GIB,
            remedies=[
                [each.words, f"`{' '.join(each.overrides)}`", gib(each.peak),
                 "yes" if each.fits else "no"]
                for each in remedies
            ],
            own=[name for name in plan.config.reward.models if ":" in name],
            networks=networks(plan),
            worst=worst,
            kinds=kinds,
            peaks=[
                [name, gib(cost.peak), *(gib(cost.parts.get(kind, 0)) for kind in kinds)]
                for name, cost in phases.items()
            ],
            collectives=list(COLLECTIVES),
            work=[
                [name, tera(cost.flops),
                 *(f"{gib(cost.sent[c])} in {cost.calls[c]}" for c in COLLECTIVES)]
                for name, cost in phases.items()
            ],
            iterations=iterations(plan),
            shares=shares(plan),
            mean=mean,
            moved=[f"{costs.mean(sent(c)) / GIB:.1f} GiB {c}" for c in COLLECTIVES],
            times=times(mean, gpu.mfu, train.iter_num),
            operations=costs.mean(lambda cost: cost.operations),
            gatherings=costs.mean(lambda cost: cost.gatherings),
            host=host,
            floor=costs.mean(host.seconds),
            waiting=waiting(plan, gpu, host),
        )  # fmt: skip


def fit_as_markdown(fit: Fit, gpu: Gpu) -> str:
    """The set and what was traced to find it; the plan with the set follows."""
    plan, tried = fit.plan, fit.rehearsals
    template = templates(Path(__file__).parent).get_template("fit.md.j2")
    return template.render(
        plan=plan,
        gpu=gpu,
        fits=plan.fits(gpu),
        changes=[[c.words, f"`{' '.join(c.overrides)}`", c.price] for c in fit.changes],
        overrides=" ".join(together(fit.changes)),
        cache=cache_command(fit),
        missing=gib(-plan.spare(gpu)),
        enough=math.ceil(10 * (gpu.memory - plan.spare(gpu) / GIB)) / 10,
        tried=[
            [words_of(r.changes), str(r.num_kinds), gib(r.peak), "yes" if r.fits else "no"]
            for r in tried
        ],
    )


def words_of(changes: Changes) -> str:
    """Changes by their overrides; none is the configuration as it is."""
    return f"`{' '.join(together(changes))}`" if changes else "as it is"


def cache_command(fit: Fit) -> str:
    """What makes the cache that the set names; empty where it names none.

    All other overrides are in it: a cache of another precision or resolution is refused.
    """
    made = [folder for c in fit.changes if c.cached for folder in c.overrides]
    if not made:
        return ""
    folder = made[0].removeprefix("paths.cache=")
    others = together(tuple(change for change in fit.changes if not change.cached))
    words = [str(fit.wanted.file), "--output", folder, *fit.wanted.overrides, *others]
    return shlex.join(["python", "-m", "senseflow.cache", *words])


def fit_as_tree(fit: Fit, gpu: Gpu) -> dict[str, Any]:
    """What programs read of a fit beside its plan; sizes are bytes."""
    return {
        "fits": fit.plan.fits(gpu),
        "overrides": list(together(fit.changes)),
        "changes": [vars(change) for change in fit.changes],
        "cache_command": cache_command(fit),
        "rehearsals": [vars(r) | {"changes": list(together(r.changes))} for r in fit.rehearsals],
    }


def networks(plan: Plan) -> Rows:
    """Parameters, gradients, optimizer states and average of each network."""
    rows = []
    for name, held in plan.networks.items():
        dtypes = ", ".join(f"{gib(size)} {dtype}" for dtype, size in held.parameters.items())
        own = [gib(held.gradients), gib(held.states), gib(held.average)]
        rows.append([name, f"{held.numel:,}", dtypes or "shared", *own])
    return rows


def iterations(plan: Plan) -> Rows:
    """Every kind of iteration that was traced: its peak, the phase in which it lies, its work."""
    rows = []
    for kind, phases in plan.costs.traced.items():
        highest = max(phases, key=lambda name: phases[name].peak)
        whole = sum(cost.flops for cost in phases.values())
        rows.append([str(kind), gib(peak(phases)), highest, tera(whole)])
    return rows


def shares(plan: Plan) -> Rows:
    """What each network and each backward adds to the mean iteration, the most first."""
    mean = mean_work(plan)
    most_first = sorted(mean.items(), key=lambda pair: -pair[1])
    return [[name, tera(done), f"{done / sum(mean.values()):.1%}"] for name, done in most_first]


def mean_work(plan: Plan) -> dict[str, float]:
    """FLOPs of the mean iteration by what does them."""
    traced = plan.costs.traced.values()
    names = {name for phases in traced for cost in phases.values() for name in cost.work}
    return {name: plan.costs.mean(work_of(name)) for name in sorted(names)}


def times(mean: float, mfu: float, iter_num: int) -> Rows:
    """Seconds of an iteration of so many FLOPs and hours of the run, by GPU."""
    rows = []
    for gpu, tflops in DENSE_TFLOPS.items():
        each = seconds(mean, gpu, mfu)
        rows.append([gpu, str(tflops), f"{each:.2f}", f"{each * iter_num / 3600:.1f}"])
    return rows


def waiting(plan: Plan, gpu: Gpu, host: Host) -> list[str]:
    """The GPUs that wait for this host at every iteration, where nothing is compiled."""
    mean, floor = plan.costs.mean(flops), plan.costs.mean(host.seconds)
    return [name for name in DENSE_TFLOPS if seconds(mean, name, gpu.mfu) < floor]


def as_tree(plan: Plan, gpu: Gpu, host: Host, remedies: list[Remedy]) -> dict[str, Any]:
    """What programs read of a plan; sizes are bytes."""
    mean = plan.costs.mean(flops)
    return {
        "recipe": plan.config.recipe,
        "nodes": plan.wanted.nodes,
        "gpus": plan.wanted.gpus,
        "overrides": list(plan.wanted.overrides),
        "teacher": plan.teacher,
        "data": plan.data,
        "memory_gib": gpu.memory,
        "reserve_gib": plan.reserve(gpu),
        "fits": plan.fits(gpu),
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
        "mean_operations": plan.costs.mean(lambda cost: cost.operations),
        "mean_gatherings": plan.costs.mean(lambda cost: cost.gatherings),
        "host": vars(host),
        "host_floor_s": plan.costs.mean(host.seconds),
        "time_s": {name: seconds(mean, name, gpu.mfu) for name in DENSE_TFLOPS},
        "remedies": [vars(remedy) for remedy in remedies],
    }
