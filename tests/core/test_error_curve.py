"""The error curve, and times drawn with a density proportional to it."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from senseflow.core.anchors import Anchors
from senseflow.core.error_curve import ErrorCurve, reconstruction_error

CURVE = ErrorCurve((0.0, 100.0, 250.0, 260.0, 600.0, 1000.0), (0.0, 2.0, 0.5, 0.5, 3.0, 7.0))


def uniforms(num: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand(num, dtype=dtype, generator=torch.Generator().manual_seed(0))


def area(low: float, high: float) -> float:
    """Of CURVE, by quadrature over numpy's own interpolation."""
    inside = [t for t in CURVE.times if low < t < high]
    knots = [low, *inside, high]

    def xi(t):
        return np.interp(t, CURVE.times, CURVE.errors)

    return sum(integrate.quad(xi, a, b)[0] for a, b in itertools.pairwise(knots))


def test_the_error_is_a_mean_over_the_elements_of_each_sample():
    x, y = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    expected = ((x.numpy() - y.numpy()) ** 2).mean((1, 2, 3))
    np.testing.assert_allclose(reconstruction_error(x, y), expected, rtol=1e-6)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1000.0), (20.0, 492.8), (255.0, 258.0)])
def test_the_cumulative_at_a_quantile_is_u(low, high):
    u = torch.tensor([0, 1e-9, 0.1, 0.25, 0.5, 0.75, 0.9, 0.999, 1], dtype=torch.float64)
    t = CURVE.quantile(u, low, high)
    found = [area(low, x) / area(low, high) for x in t.tolist()]
    np.testing.assert_allclose(found, u, atol=1e-9)
    assert t[0] == low and t[-1] == pytest.approx(high, abs=1e-9)


def test_drawn_times_follow_the_density():
    low, high = 50.0, 950.0
    t = CURVE.quantile(uniforms(4000), low, high).double()
    assert t.min() >= low and t.max() <= high
    grid = np.linspace(low, high, 500)
    cdf = np.array([area(low, x) for x in grid]) / area(low, high)
    fine = stats.kstest(t, lambda x: np.interp(x, grid, cdf))
    assert fine.pvalue > 0.01
    assert stats.kstest(t, stats.uniform(low, high - low).cdf).pvalue < 1e-9


def test_a_straight_line_from_nothing_gives_a_square_root():
    t = ErrorCurve((0.0, 1000.0), (0.0, 4.0)).quantile(uniforms(100), 0.0, 1000.0)
    torch.testing.assert_close(t, 1000 * uniforms(100).sqrt())


@pytest.mark.parametrize("knots", [(0.0, 1000.0), (0.0, 3.0, 700.0, 960.0, 1000.0)])
def test_a_flat_curve_draws_as_without_one(knots):
    anchors, u = Anchors((1000.0, 904.5, 512.8)), uniforms(1000)
    flat = ErrorCurve(knots, (0.37,) * len(knots))
    for index in range(3):
        plain = anchors.midpoint(index, 20.0, u)
        torch.testing.assert_close(anchors.midpoint(index, 20.0, u, flat), plain, atol=1e-3, rtol=0)


def test_where_the_curve_is_nothing_no_time_is_drawn():
    gap = ErrorCurve((0.0, 10.0, 20.0, 80.0, 90.0, 100.0), (1.0, 1.0, 0.0, 0.0, 1.0, 0.0))
    t = gap.quantile(torch.cat([uniforms(2000), torch.tensor([0.0, 0.6])]), 0.0, 100.0)
    assert not ((t > 20.001) & (t < 79.999)).any()
    assert ((t >= 0) & (t <= 100)).all()


def test_midpoints_keep_the_margins():
    anchors = Anchors((1000.0, 904.5))
    t = anchors.midpoint(0, 20.0, torch.tensor([0.0, 0.5, 1.0]), CURVE)
    assert t[0] == 924.5 and t[2] == pytest.approx(980)
    assert 952.25 < t[1] < 980  # the curve rises: later than the uniform law's middle


@pytest.mark.parametrize(
    ("times", "errors", "message"),
    [
        ((0.0,), (1.0,), "no curve"),
        ((0.0, 1.0), (1.0,), "2 times and 1 errors"),
        ((0.0, 2.0, 1.0), (1.0, 1.0, 1.0), "must rise"),
        ((0.0, math.nan), (1.0, 1.0), "must rise"),
        ((0.0, 1.0), (1.0, math.nan), "finite and not negative, got nan"),
        ((0.0, 1.0), (-0.1, 1.0), "not negative, got -0.1"),
    ],
)
def test_what_is_no_curve_is_refused(times, errors, message):
    with pytest.raises(ValueError, match=message):
        ErrorCurve(times, errors)


def test_a_segment_the_curve_says_nothing_of_is_refused():
    anchors = Anchors((1000.0, 500.0))
    ErrorCurve((0.0, 1000.0), (0.0, 1.0)).require(0.0, 1000.0)
    with pytest.raises(ValueError, match="from 100 to 1000 does not cover 20 to 480"):
        anchors.check_curve(ErrorCurve((100.0, 1000.0), (1.0, 1.0)), 20.0)
    with pytest.raises(ValueError, match="from 0 to 900 does not cover 520 to 980"):
        anchors.check_curve(ErrorCurve((0.0, 900.0), (1.0, 1.0)), 20.0)
    with pytest.raises(ValueError, match="is 0 from 20 to 480"):
        anchors.check_curve(ErrorCurve((0.0, 490.0, 1000.0), (0.0, 0.0, 1.0)), 20.0)
