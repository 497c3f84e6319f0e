"""What a plain pipeline must be told, against stock schedulers set as the pipelines set them."""

import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LCMScheduler

from senseflow.core.levels import even_times, one_shift
from senseflow.teachers.family import Family
from senseflow.teachers.flux.family import FLUX
from senseflow.teachers.sd35.family import SD35
from senseflow.teachers.sdxl.family import SDXL


def spaced(shift: float, num: int) -> tuple[float, ...]:
    return tuple(shift * u / (1 + (shift - 1) * u) for u in even_times(num))


def sigmas_of(family: Family, anchors: tuple[float, ...]) -> torch.Tensor:
    """As the family's pipeline sets the scheduler of an exported folder."""
    stock = family.stock_sampling(anchors)
    scheduler = FlowMatchEulerDiscreteScheduler(**stock.changes)
    num = stock.levels.get("num_inference_steps")
    if num is None:
        scheduler.set_timesteps(sigmas=stock.levels["sigmas"])
    elif family is FLUX:
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / num, num))
    else:
        scheduler.set_timesteps(num)
    assert torch.equal(scheduler.timesteps, 1000 * scheduler.sigmas[:-1])
    return scheduler.sigmas[:-1]


@pytest.mark.parametrize("num", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("shift", [1.0, 3.0, 3.1582, math.exp(1.15)])
@pytest.mark.parametrize("family", [FLUX, SD35])
@pytest.mark.parametrize("single", [False, True])
def test_the_number_of_steps_alone_gives_one_shifts_anchors(family, shift, num, single):
    anchors = spaced(shift, num)
    if single:  # as a run's card has them
        anchors = tuple(torch.tensor(anchors).tolist())
    stock = family.stock_sampling(anchors)
    assert stock.levels == {"num_inference_steps": num}
    assert stock.changes["stochastic_sampling"] and not stock.changes["use_dynamic_shifting"]
    rounded = torch.tensor(family.rounded(anchors, list(anchors)))
    assert torch.equal(sigmas_of(family, anchors), rounded)  # ours, to the bit
    torch.testing.assert_close(rounded, torch.tensor(anchors), rtol=0, atol=3e-7)


@pytest.mark.parametrize(
    "anchors",
    [(1.0, 0.9, 0.7, 0.5), (1.0, 0.999, 0.75, 0.5), (1.0, 0.9045, 0.7595, 0.5128), (0.95, 0.6)],
)
@pytest.mark.parametrize("family", [FLUX, SD35])
def test_other_anchors_are_told_as_sigmas(family, anchors):
    stock = family.stock_sampling(anchors)
    assert stock.levels == {"sigmas": list(anchors)} and stock.changes["shift"] == 1
    assert torch.equal(sigmas_of(family, anchors), torch.tensor(anchors))
    assert family.rounded(anchors, list(anchors)) == list(anchors)


def test_flux_is_shifted_and_sd35_stretched():
    """FLUX: e^1.15, at any number of steps; SD3.5: near 2, its last sigma fixed."""
    flux = FLUX.stock_sampling(spaced(math.exp(1.15), 4)).changes
    assert SD35.rounded((1.0, 0.9, 0.75, 0.5), [1.0, 0.75]) == [1.0, 0.75]
    assert flux["shift"] == pytest.approx(3.158193, abs=1e-6) and flux["shift_terminal"] is None
    sd35 = SD35.stock_sampling((1.0, 0.9, 0.75, 0.5)).changes
    assert sd35["shift"] == pytest.approx(2.004, abs=1e-3) and sd35["shift_terminal"] == 0.5


@pytest.mark.parametrize(
    ("anchors", "levels"),
    [
        ((999, 749, 499, 249), {"num_inference_steps": 4}),
        ((999, 499), {"num_inference_steps": 2}),
        ((999,), {"num_inference_steps": 1}),
        ((999, 874, 749, 624, 499, 374, 249, 124), {"num_inference_steps": 8}),
        ((999, 759, 509, 259), {"timesteps": [999, 759, 509, 259]}),
        ((999, 665, 332), {"timesteps": [999, 665, 332]}),
    ],
)
def test_lcm_at_sdxls_timesteps(anchors, levels):
    stock = SDXL.stock_sampling(anchors)
    assert stock.levels == levels and stock.guidance == 0
    scheduler = LCMScheduler(**stock.changes)
    scheduler.set_timesteps(**levels)
    assert tuple(scheduler.timesteps.tolist()) == anchors


def test_one_shift():
    assert one_shift(spaced(3.1582, 4)) == 3.1582
    assert one_shift((1.0, 0.9, 0.75, 0.5)) == 3
    assert one_shift((1.0,)) == 1
    assert one_shift((1.0, 0.9045, 0.7595, 0.5128)) is None
    assert one_shift((0.9, 0.5)) is None
