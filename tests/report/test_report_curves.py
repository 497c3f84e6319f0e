"""The drawing of curves: scales, ticks, what is left out of long curves, and spans of time."""

import math
import re

import numpy as np
import pytest

from senseflow.report.curves import (
    BANDS,
    HEIGHT,
    POINTS,
    WIDTH,
    Chart,
    Scale,
    draw,
    scales,
    smoothed,
    thinned,
    ticks,
)
from senseflow.report.pictures import evenly
from senseflow.report.run_folder import duration
from senseflow.report.signals import Curve


def curve(values) -> Curve:
    return Curve(np.arange(1, len(values) + 1, dtype=float), np.asarray(values, dtype=float))


@pytest.mark.parametrize("low, high", [(0, 1), (-3, 7), (0.031, 0.0317), (1e-9, 5e-9), (0, 12345)])
def test_ticks_are_few_round_and_inside(low, high):
    found = ticks(Scale(low, high, 0, 100), 5)
    assert 2 <= len(found) <= 7 and all(low <= t <= high * (1 + 1e-9) for t in found)
    steps = np.diff(found)
    mantissa = steps[0] / 10 ** math.floor(math.log10(steps[0]) + 1e-9)
    assert np.allclose(steps, steps[0]) and min(abs(mantissa - m) for m in (1, 2, 5, 10)) < 1e-6


def test_a_scale_is_linear_or_logarithmic():
    assert [Scale(0, 10, 100, 0)(v) for v in (0, 5, 10, 20)] == [100, 50, 0, 0]
    log = Scale(0.01, 100, 0, 4, log=True)
    assert [log(v) for v in (0.01, 0.1, 1, 100)] == pytest.approx([0, 1, 2, 4])
    assert ticks(log, 6) == pytest.approx([0.01, 0.1, 1, 10, 100])


def test_which_scale_is_chosen():
    assert scales(Chart("", {"a": curve([1, 1000])}))[1].log
    assert not scales(Chart("", {"a": curve([1, 20])}))[1].log
    assert not scales(Chart("", {"a": curve([-1, 1000])}))[1].log
    drift = scales(Chart("", {"a": curve([0.01, 0.2])}, around_zero=True))[1]
    assert (drift.low, drift.high) == (-0.2, 0.2)


def test_long_curves_keep_their_peaks():
    values = np.random.default_rng(0).standard_normal(20_000)
    values[[777, 12_345]] = 50, -50
    thin = thinned(curve(values))
    assert len(thin.values) <= POINTS + 2
    assert thin.values.max() == 50 and thin.values.min() == -50
    assert np.array_equal(thin.values, values[thin.iterations.astype(int) - 1])
    assert thinned(curve(values[:POINTS])).values.tolist() == values[:POINTS].tolist()


def test_the_strong_line_is_a_running_median():
    values = np.random.default_rng(0).standard_normal(48)
    middle = smoothed(curve(values)).values
    assert middle[20] == np.median(values[18:23]) and middle[0] == np.median(values[:3])


def test_a_drawing_is_small_and_stays_in_its_frame():
    values = np.exp(np.random.default_rng(0).standard_normal(20_000) * 4)
    text = draw(Chart("loss", {"a": curve(values), "b": curve(values[::-1])}))
    assert len(text) < 40_000 and text.count("<title>") == BANDS
    for x, y in re.findall(r"[ML]([\d.-]+) ([\d.-]+)", text):
        assert 0 <= float(x) <= WIDTH and 0 <= float(y) <= HEIGHT


def label_of(text: str) -> tuple[float, float, str]:
    """x, y and text-anchor of the one name of a level in a drawing; it is drawn over all curves."""
    (found,) = re.findall(r'<text class="level" x="([^"]+)" y="([^"]+)" text-anchor="(\w+)">', text)
    assert text.rindex('class="level"') > text.rindex('class="curve')
    return float(found[0]), float(found[1]), found[2]


@pytest.mark.parametrize(
    ("values", "anchor", "above"),
    [
        ([3.0] * 40, "start", True),  # nothing near
        ([10.4] * 8 + [3.0] * 32, "end", True),  # a curve above the beginning of the line
        ([10.4] * 40, "start", False),  # above all of it
    ],
)
def test_the_name_of_a_level_stands_where_no_curve_is(values, anchor, above):
    values[19:21] = 14.0, 1.0  # the scale goes on above and below the level
    chart = Chart("grad", {"a": curve(values)}, lines=((10.0, "clipped above"),))
    x, y = scales(chart)
    at_x, at_y, found = label_of(draw(chart))
    assert found == anchor and (at_y < y(10.0)) is above
    assert at_x == (x.start + 4 if anchor == "start" else x.end - 4)


def test_one_row_stands_on_an_axis_that_begins_at_zero():
    one = Chart("loss", {"a": Curve(np.array([500.0]), np.array([2.0]))})
    x, _ = scales(one)
    assert (x.low, x.high) == (0.0, 500.0)
    text = draw(one)
    assert ">0</text>" in text and ">400</text>" in text and text.count("<circle") == 1


def test_values_that_are_not_finite_leave_a_gap_and_a_cross():
    text = draw(Chart("loss", {"a": curve([1, 2, math.nan, 3, math.inf, 2])}))
    path = re.search(r'class="curve c0" d="([^"]+)"', text)
    assert path and path[1].count("M") == 3 and path[1].count("L") == 1
    assert text.count("×") == 2 and text.count("<circle") == 4


def test_evenly_spaced_places():
    assert evenly(3, 5) == [0, 1, 2] and evenly(0, 5) == []
    assert evenly(100, 5) == [0, 25, 50, 74, 99] and evenly(9, 1) == [8]


@pytest.mark.parametrize(
    "seconds, said",
    [(0, "0 s"), (59.6, "1 min"), (90, "1 min 30 s"), (3600, "1 h"), (7325, "2 h 2 min"),
     (90_000, "1 d 1 h")],
)  # fmt: skip
def test_spans_of_time(seconds, said):
    assert duration(seconds) == said
