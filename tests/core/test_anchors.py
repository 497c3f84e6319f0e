"""Anchors, mid-points and the laws of t."""

import math

import pytest
import torch
from scipy import stats

from senseflow.core.anchors import (
    Anchors,
    draw_range,
    draw_time,
    dynamic_mu,
    exponential_shift,
    shift_time,
)
from senseflow.core.levels import TIMESTEPS

FLUX = (256, 4096, 0.5, 1.15)  # base tokens, max tokens, base shift, max shift


def test_segments_end_at_the_next_anchor_and_at_the_clean_end():
    anchors = Anchors((1000.0, 900.0, 750.0), end=0.0)
    assert [anchors.segment(i) for i in range(3)] == [(900, 1000), (750, 900), (0, 750)]


def test_fewer_steps_are_evenly_spread_from_the_first_anchor_and_end_where_all_do():
    anchors = Anchors((999.0, 749.0, 499.0, 249.0), end=-1.0)
    assert anchors.of_walk(4) == anchors
    assert anchors.of_walk(2) == Anchors((999.0, 499.0), end=-1.0)
    assert anchors.of_walk(2).segment(1) == (-1.0, 499.0)
    for steps in (1, 2, 4):  # as the sampler chooses them
        assert [*anchors.of_walk(steps).times] == TIMESTEPS.of_steps([*anchors.times], steps)


@pytest.mark.parametrize("times", [(), (500.0, 700.0), (500.0, 500.0), (500.0, 0.0)])
def test_anchors_must_fall(times):
    with pytest.raises(ValueError, match="anchor"):
        Anchors(times)


def test_midpoints_fill_the_segment_between_the_margins():
    anchors = Anchors((1000.0, 904.5))
    t = anchors.midpoint(0, 20.0, torch.tensor([0.0, 0.5, 1.0]))
    torch.testing.assert_close(t, torch.tensor([924.5, 952.25, 980.0]))


def test_a_margin_without_room_is_refused_with_the_largest_that_fits():
    with pytest.raises(ValueError, match=r"1000 and 904.5.*below 47.75"):
        Anchors((1000.0, 904.5)).check_margin(50)
    Anchors((1000.0, 904.5)).check_margin(47)


def test_dynamic_shift_of_the_sizes_flux_users_know():
    sizes = {256: 0.5, 512: 0.63, 768: 0.8467, 1024: 1.15}
    for side, mu in sizes.items():
        assert dynamic_mu((side // 16) ** 2, *FLUX) == pytest.approx(mu, abs=5e-5)
    shift = exponential_shift(1.15)
    anchors = [shift_time(t, shift) for t in (1000, 750, 500, 250)]
    assert anchors == pytest.approx([1000, 904.5, 759.5, 512.8], abs=0.06)
    for mu in (0.5, 0.63, 0.7, 0.8467, 0.9, 1.01, 1.15, 1.3):
        assert shift_time(1000, exponential_shift(mu)) == 1000  # exactly the top of the clock
    sigma = 0.3
    assert shift_time(300, shift) / 1000 == pytest.approx(
        math.exp(1.15) / (math.exp(1.15) + 1 / sigma - 1)
    )


def test_logit_normal_times_have_the_law_of_sigmoid_of_a_normal():
    u = (torch.arange(20000) + 0.5) / 20000
    t = draw_time("logit_normal", u, 0, 1000).double() / 1000
    logit = torch.log(t / (1 - t)).numpy()
    assert stats.kstest(logit, "norm").statistic < 1e-3


def test_time_range_bounds_both_laws():
    u = torch.rand(1000)
    for law in ("uniform", "logit_normal"):
        t = draw_time(law, u, 20, 980)
        assert t.min() >= 20 and t.max() <= 980 and t.dtype == torch.float32
    assert draw_time("uniform", torch.tensor([0.0, 0.5]), 20, 980).tolist() == [20, 500]


def test_guidance_range_may_be_one_value():
    assert draw_range(5, 5, torch.rand(3)).tolist() == [5, 5, 5]
