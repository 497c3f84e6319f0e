"""xi.png: the teacher's error over t with anchors and segments, and where mid-points are drawn."""

import io
import itertools
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from senseflow.core.anchors import Anchors
from senseflow.core.error_curve import ErrorCurve
from senseflow.reconstruction_error.measure import segments

INK, MUTED, BANDS = "#22303c", "#8a97a3", ("#e6edf4", "#f7f9fb")
COLOURS = ("#1f6fb2", "#d1622b", "#3b8f5a", "#8a4fa3", "#b0892c")


def draw(measured: dict[str, Any], anchors: Anchors, margin: float, title: str) -> Image.Image:
    """The picture of an xi.json's curves."""
    figure = Figure(figsize=(8, 6), dpi=110, layout="constrained")
    error, density = figure.subplots(2, 1, sharex=True, height_ratios=(2.2, 1))
    _draw_errors(error, measured)
    _draw_densities(density, measured, anchors, margin)
    for axes in (error, density):
        _draw_anchors(axes, anchors)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=INK, labelsize=9)
    for index in range(len(anchors)):
        low, high = anchors.segment(index)
        error.text(
            (low + high) / 2, 1.01, f"segment {len(anchors) - index}", ha="center", va="bottom",
            color=MUTED, fontsize=9, transform=error.get_xaxis_transform(),
        )  # fmt: skip
        error.text(
            anchors.times[index] - 4, 0.02, rf"$\tau_{{{len(anchors) - index}}}$", ha="right",
            color=MUTED, fontsize=10, transform=error.get_xaxis_transform(),
        )  # fmt: skip
    error.set_title(title, loc="left", color=INK, fontsize=11, pad=20)
    density.set_xlabel("t, thousandths of the teacher's clock (right: noise)", color=INK)
    density.set_xlim(anchors.end, anchors.times[0] + 8)
    with io.BytesIO() as stream:
        figure.savefig(stream, format="png")
        return Image.open(stream).convert("P", palette=Image.Palette.ADAPTIVE, colors=255)


def _draw_errors(axes: Axes, measured: dict[str, Any]) -> None:
    """xi(t) / E ||x_0||^2 with a band of two standard errors; log y. The exact 0 has no log."""
    t = measured["times"][1:]
    for curve, colour in zip(measured["curves"], itertools.cycle(COLOURS), strict=False):
        xi = torch.tensor(curve["normalised"][1:])
        band = 2 * torch.tensor(curve["normalised_standard_error"][1:])
        label = f"guidance {curve['guidance']:g}"
        axes.plot(t, xi, color=colour, marker=".", markersize=4, linewidth=1.5, label=label)
        axes.fill_between(t, (xi - band).clamp_min(xi / 10), xi + band, color=colour, alpha=0.2)
    axes.set_yscale("log")
    axes.set_ylabel(r"$\xi(t)\;/\;E\,\|x_0\|^2$", color=INK)
    axes.grid(axis="y", color=MUTED, alpha=0.25, linewidth=0.6)
    axes.legend(frameon=False, fontsize=9, loc="upper left")


def _draw_densities(axes: Axes, measured: dict[str, Any], anchors: Anchors, margin: float) -> None:
    """How much more often than uniformly the first curve draws ISG's mid-points, per segment."""
    first = measured["curves"][0]
    curve = ErrorCurve(tuple(measured["times"]), tuple(first["error"]))
    u = torch.linspace(0, 1, 401, dtype=torch.float64)
    for low, high in segments(anchors, margin):
        t = curve.quantile(u, low, high)
        middle, density = (t[1:] + t[:-1]) / 2, u.diff() / t.diff()
        label = f"isg.midpoint: error (guidance {first['guidance']:g})"
        axes.plot(middle, density * (high - low), color=COLOURS[0], linewidth=1.5, label=label)
        axes.plot([low, high], [1, 1], color=INK, linestyle=":", linewidth=1.2, label="uniform")
    axes.set_ylim(0, 1.3 * axes.get_ylim()[1])  # room for the legend
    axes.set_ylabel("density of $t_{mid}$\nover uniform", color=INK)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[:2], labels[:2], frameon=False, fontsize=9, loc="upper right", ncols=2)


def _draw_anchors(axes: Axes, anchors: Anchors) -> None:
    """A line at each anchor, named tau_1 (cleanest) to tau_K, and shaded segments."""
    for index, time in enumerate(anchors.times):
        low, high = anchors.segment(index)
        axes.axvspan(low, high, color=BANDS[index % 2], zorder=-2)
        axes.axvline(time, color=MUTED, linestyle="--", linewidth=0.9, zorder=-1)
