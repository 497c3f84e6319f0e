"""xi.png: the teacher's error over t, with the student's anchors and their segments."""

import io
import itertools
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from senseflow.core.anchors import Anchors

INK, MUTED, BANDS = "#22303c", "#8a97a3", ("#e6edf4", "#f7f9fb")
COLOURS = ("#1f6fb2", "#d1622b", "#3b8f5a", "#8a4fa3", "#b0892c")


def draw(measured: dict[str, Any], anchors: Anchors, title: str) -> Image.Image:
    """The picture of an xi.json's curves."""
    figure = Figure(figsize=(8, 4.6), dpi=110, layout="constrained")
    axes = figure.subplots()
    _draw_errors(axes, measured)
    _draw_segments(axes, anchors)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=9)
    axes.set_title(title, loc="left", color=INK, fontsize=11, pad=20)
    axes.set_xlabel("t, thousandths of the teacher's clock (right: noise)", color=INK)
    axes.set_xlim(anchors.end, anchors.times[0] + 8)
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


def _draw_segments(axes: Axes, anchors: Anchors) -> None:
    """Shaded segments, numbered, and a line at each anchor, tau_1 (cleanest) to tau_K."""
    place = axes.get_xaxis_transform()  # x in data, y in the axes' own 0 to 1
    for index, time in enumerate(anchors.times):
        low, high = anchors.segment(index)
        number = len(anchors) - index
        axes.axvspan(low, high, color=BANDS[index % 2], zorder=-2)
        axes.axvline(time, color=MUTED, linestyle="--", linewidth=0.9, zorder=-1)
        axes.text(
            (low + high) / 2, 1.01, f"segment {number}", ha="center", va="bottom",
            color=MUTED, fontsize=9, transform=place,
        )  # fmt: skip
        axes.text(
            time - 4, 0.02, rf"$\tau_{{{number}}}$", ha="right",
            color=MUTED, fontsize=10, transform=place,
        )  # fmt: skip
