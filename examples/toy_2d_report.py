"""What toy_2d.py reports: distances of samples, and the picture."""

from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

COLOURS = ("#7a8793", "#2f7fc1", "#e08a1e", "#b23a6f")
INK, LIMIT = "#22303c", 3.2


def energy_distance(x: Tensor, y: Tensor) -> Tensor:
    """2 E|x - y| - E|x - x'| - E|y - y'|, (S,), of samples (S, N, 2)."""
    xy, xx, yy = (torch.cdist(a, b).mean((1, 2)) for a, b in ((x, y), (x, x), (y, y)))
    return 2 * xy - xx - yy


def posterior_mean(x_t: Tensor, samples: Tensor, alpha: float, sigma: float) -> Tensor:
    """E[x_0 | x_t], (S, N, 2), where x_0 is one of these samples (S, M, 2), all alike."""
    squared = torch.cdist(x_t, alpha * samples).square()
    return (-squared / (2 * sigma**2)).softmax(2) @ samples


def draw(runs: dict, teacher, file: Path) -> None:
    """runs: name of the variant -> (curve, snapshots), as `distil` returns them."""
    figure = Figure(figsize=(12, 10), dpi=80, layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(2, 0.9))
    panels = top.subplots(2, len(runs))
    for column, (name, (_, snapshots)) in enumerate(runs.items()):
        for axes, (iteration, samples) in zip(panels[:, column], snapshots.items(), strict=True):
            _draw_samples(axes, samples[0], teacher)
            if column == 0:
                axes.set_ylabel(f"iteration {iteration}", color=INK, fontsize=12)
        colour = COLOURS[column]
        panels[0, column].set_title(name, color=colour, fontsize=15, fontweight="bold")
    distance, lag = bottom.subplots(1, 2)
    _draw_curves(distance, runs, 0, "energy distance to the teacher's samples")
    _draw_curves(lag, runs, 1, r"fake score's error: mean $|\hat{x}_0 - E[x_0 \, | \, x_t]|^2$")
    distance.legend(frameon=False, fontsize=10, ncols=2)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)


def _draw_samples(axes: Axes, samples: Tensor, teacher) -> None:
    ticks = torch.linspace(-LIMIT, LIMIT, 160)
    points = torch.cartesian_prod(ticks, ticks)
    density = teacher.density(points).view(160, 160).T
    axes.contourf(ticks, ticks, density.sqrt(), levels=12, cmap="Blues", alpha=0.9)
    axes.scatter(*samples.T, s=4, color="#d1462f", alpha=0.65, linewidths=0)
    axes.set(xlim=(-LIMIT, LIMIT), ylim=(-LIMIT, LIMIT), xticks=[], yticks=[], aspect="equal")


def _draw_curves(axes: Axes, runs: dict, column: int, title: str) -> None:
    """The median over seeds, and a band from the least to the greatest."""
    for (name, (curve, _)), colour in zip(runs.items(), COLOURS, strict=False):
        n = [point[0] for point in curve]
        values = torch.stack([point[1 + column] for point in curve])  # (points, seeds)
        axes.plot(n, values.quantile(0.5, 1), color=colour, linewidth=2, label=name)
        axes.fill_between(n, values.amin(1), values.amax(1), color=colour, alpha=0.15)
    axes.set_yscale("log")
    axes.set_title(title, loc="left", color=INK, fontsize=11)
    axes.set_xlabel("iteration", color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
