"""The noise levels of 1, 2, K and 2K steps, and those named by hand."""

import math

import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler, LCMScheduler

from senseflow.core.levels import SIGMAS, TIMESTEPS, counted

FLUX = [1.0, 0.9045, 0.7595, 0.5128]
SD35 = [1.0, 0.9, 0.75, 0.5]
SDXL = [999, 749, 499, 249]


def test_fewer_steps():
    for levels, anchors in ((SIGMAS, FLUX), (SIGMAS, SD35), (TIMESTEPS, SDXL)):
        assert levels.of_steps(anchors, 4) == anchors
        assert levels.of_steps(anchors, 1) == [anchors[0]]
        assert levels.of_steps(anchors, 2) == [anchors[0], anchors[2]]
        assert levels.of_steps(anchors, 2, "first") == anchors[:2]


@pytest.mark.parametrize("shift", [math.exp(1.15), 3.0, 1.0])
def test_eight_steps_go_through_the_anchors_own_shift(shift):
    times = [1 - step / 8 for step in range(8)]
    dense = [shift * u / (1 + (shift - 1) * u) for u in times]
    assert SIGMAS.of_steps(dense[::2], 8) == pytest.approx(dense, abs=1e-9)


def test_eight_steps_of_rounded_anchors_keep_them():
    dense = SIGMAS.of_steps(FLUX, 8)
    assert dense[::2] == FLUX
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 8, 8), mu=1.15)
    assert dense == pytest.approx(scheduler.sigmas[:-1].tolist(), abs=2e-4)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_sdxls_steps_are_those_of_lcm_over_the_same_schedule(steps):
    scheduler = LCMScheduler(original_inference_steps=max(4, steps))
    scheduler.set_timesteps(steps)
    timesteps = TIMESTEPS.of_steps(SDXL, steps)
    assert timesteps == scheduler.timesteps.tolist()
    assert all(type(t) is int for t in timesteps)


@pytest.mark.parametrize("steps", [3, 5, 16, 0])
@pytest.mark.parametrize(("levels", "anchors"), [(SIGMAS, FLUX), (TIMESTEPS, SDXL)])
def test_other_numbers_of_steps_name_the_possible_ones(levels, anchors, steps):
    with pytest.raises(ValueError, match=r"in \[1, 2, 4, 8\] steps"):
        levels.of_steps(anchors, steps)


def test_eight_steps_need_anchors_of_one_shift():
    with pytest.raises(ValueError, match="not one shift"):
        SIGMAS.of_steps([1.0, 0.9, 0.3, 0.2], 8)


def test_levels_named_by_hand_are_the_anchors_themselves():
    assert SIGMAS.among(FLUX, [1, 0.904, 0.5130]) == [1.0, 0.9045, 0.5128]
    assert TIMESTEPS.among(SDXL, [999, 249]) == [999, 249]
    assert SIGMAS.among([1.0, 0.9994, 0.9988], [1, 0.9989]) == [1.0, 0.9988]


@pytest.mark.parametrize(
    ("levels", "anchors", "wanted", "said"),
    [
        (SIGMAS, SD35, [1, 0.75, 0.25], r"0\.25 is none of the trained anchors 1, 0\.9, 0\.75, "),
        (SIGMAS, SD35, [1, 0.898], r"0\.898 is none of the trained anchors 1, 0\.9, 0\.75, 0\.5"),
        (SIGMAS, SD35, [1, math.nan], "nan is none of the trained anchors"),
        (SIGMAS, SD35, [1, 0.5, 0.75], "1, 0.5, 0.75 do not fall as the trained anchors 1, 0.9"),
        (SIGMAS, SD35, [1, 0.9, 0.9001], "do not fall"),
        (SIGMAS, SD35, [0.9, 0.5], "do not begin with the first of the trained anchors 1, 0.9"),
        (TIMESTEPS, SDXL, [999, 748], "748 is none of the trained anchors 999, 749, 499, 249"),
        (TIMESTEPS, SDXL, [499, 999], "499, 999 do not fall"),
    ],
)
def test_other_levels_name_the_anchors(levels, anchors, wanted, said):
    with pytest.raises(ValueError, match=said):
        levels.among(anchors, wanted)


@pytest.mark.parametrize(
    ("anchors", "kept"),
    [
        ((1.0, 0.5), (1.0, 0.5)),
        ([1], (1.0,)),
        ([0.9], (0.9,)),
        ([999, 749], (999, 749)),
        ((999.0, 749.0), (999, 749)),
        ((399,), (399,)),
        ((999, 0), (999, 0)),
    ],
)
def test_anchors_as_a_card_keeps_them(anchors, kept):
    assert counted(anchors) == kept
    assert [type(a) for a in counted(anchors)] == [type(a) for a in kept]


@pytest.mark.parametrize(
    "anchors", [(), (0.5, 0.9), (1.0, 1.0), (1.0, -0.5), (1000, 904.5), (5, -1), (True,), ("1",)]
)
def test_wrong_anchors(anchors):
    with pytest.raises(ValueError, match="do not fall, as sigmas from 1 towards 0 or as integer"):
        counted(anchors)


def test_anchors_of_the_other_kind():
    with pytest.raises(ValueError, match="the card's anchors 999, 749 are not sigmas"):
        SIGMAS.check((999, 749))
    with pytest.raises(ValueError, match=r"the card's anchors 1, 0\.9 are not timesteps"):
        TIMESTEPS.check((1.0, 0.9))


@pytest.mark.parametrize(
    ("levels", "anchors", "possible"),
    [
        (SIGMAS, [1.0, 0.9, 0.75, 0.5], [1, 2, 4, 8]),
        (SIGMAS, [1.0, 0.9, 0.7, 0.4], [1, 2, 4]),  # of no one shift
        (SIGMAS, [1.0], [1]),
        (TIMESTEPS, [999, 700, 300], [1, 3, 6]),
    ],
)
def test_possible_steps_are_those_that_of_steps_takes(levels, anchors, possible):
    assert levels.possible_steps(anchors) == possible
    for steps in range(1, 10):
        if steps in possible:
            assert len(levels.of_steps(anchors, steps)) == steps
        else:
            with pytest.raises(ValueError, match=str(steps)):
                levels.of_steps(anchors, steps)
