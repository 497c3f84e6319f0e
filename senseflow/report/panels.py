"""Which measures of stats.jsonl are drawn where, and what each of them means."""

from dataclasses import dataclass

from senseflow.report.curves import Chart
from senseflow.report.signals import Curves, Facts

ABOUT = {
    "loss/dmd": "How far teacher and fake score disagree about the student's samples. It need not "
    "fall while the student moves.",
    "loss/isg": "The student's one step down a segment against the teacher's way through "
    "its middle.",
    "loss/adv": "Falls when the student's images look real to the discriminator.",
    "loss/generator": "The weighted sum of dmd, isg and adv: what the student's step goes down.",
    "loss/fake": "The fake score's denoising error on the student's samples.",
    "loss/discriminator": "The heads' own loss; near 0 they have won.",
    "grad_norm/generator": "Before clipping.",
    "grad_norm/fake_score": "Before clipping.",
    "grad_norm/discriminator": "Before clipping.",
    "ida/gap": "Distance of fake score and student over the student's size; should level out.",
    "discriminator/margin": "Mean D(real) − D(generated); 0 tells nothing apart.",
    "drift/mean": "Generated minus real images, on a scale of 0 to 1.",
    "drift/contrast": "Generated minus real images, on a scale of 0 to 1.",
    "drift/saturation": "Generated minus real images, on a scale of 0 to 1.",
    "time_s/iteration": "Wall time, saves not counted.",
    "mem_gib": "The peak of device memory so far.",
}
GROUPS = (
    ("Losses", "loss/"),
    ("Gradient norms", "grad_norm/"),
    ("Stability", "ida/"),
    ("Stability", "discriminator/"),
    ("Stability", "drift/"),
    ("Schedule, time and memory", "lr/"),
    ("Schedule, time and memory", "time_s/"),
    ("Schedule, time and memory", "mem_gib"),
)
OTHER = "Other measures"
NAMES = {"lr/": "learning rates", "time_s/": "phases"}  # measures drawn in one picture


@dataclass(frozen=True)
class Panel:
    """One picture of the page, and the measures in it."""

    group: str
    chart: Chart
    measures: tuple[str, ...]


def panels_of(curves: Curves, facts: Facts) -> list[Panel]:
    """All measures, group by group; those nobody has named come last."""
    panels = []
    together: dict[str, dict[str, str]] = {}
    for name in sorted(curves, key=_place):
        prefix = next((p for p in NAMES if name.startswith(p)), None)
        if prefix and name != "time_s/iteration":
            together.setdefault(prefix, {})[name.removeprefix(prefix)] = name
        else:
            panels.append(Panel(_group(name), _single(name, curves, facts), (name,)))
    for prefix, measures in together.items():
        chart = Chart(
            NAMES[prefix],
            {short: curves[name] for short, name in measures.items()},
            about="" if prefix == "lr/" else "Where the time of an iteration goes.",
            marks=facts.resumed,
            unit=" s" if prefix == "time_s/" else "",
        )
        panels.append(Panel(_group(prefix), chart, tuple(measures.values())))
    order = [*dict.fromkeys(group for group, _ in GROUPS), OTHER]
    return sorted(panels, key=lambda panel: order.index(panel.group))


def _single(name: str, curves: Curves, facts: Facts) -> Chart:
    lines: tuple[tuple[float, str], ...] = ()
    if name.startswith("grad_norm/") and facts.max_grad_norm:
        lines = ((facts.max_grad_norm, "clipped above"),)
    if name == "discriminator/margin" and facts.adversary == "vfm":
        lines = ((2.0, "the hinge lets go"),)
    if name.startswith("drift/"):
        lines = ((0.0, ""),)
    return Chart(
        name,
        {name: curves[name]},
        about=ABOUT.get(name, ""),
        lines=lines,
        marks=facts.resumed,
        around_zero=name.startswith("drift/"),
        unit=" s" if name.startswith("time_s/") else " GiB" if name == "mem_gib" else "",
    )


def _group(name: str) -> str:
    return next((group for group, prefix in GROUPS if name.startswith(prefix)), OTHER)


def _place(name: str) -> int:
    """The order of ABOUT, then that of the rows."""
    order = list(ABOUT)
    return order.index(name) if name in order else len(order)
