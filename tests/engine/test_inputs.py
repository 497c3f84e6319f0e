"""What is asked of a configuration and its teacher's folder before anything is loaded."""

import pytest

from senseflow.config.config import load_config
from senseflow.config.recipes import FAMILIES
from senseflow.engine.inputs import read_setup
from senseflow.teachers.flux.family import FLUX
from senseflow.teachers.sd35.family import SD35

TINY = "configs/FLUX/flux_senseflow_tiny.yaml"
TINY_SD35 = "configs/SD35/sd35_senseflow_tiny.yaml"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        # omega is (1 - sigma)^2 at the anchors 1, .9045, .7595, .5128
        ("adversarial.least_omega=0.3", r"adversarial.least_omega 0.3: .* largest omega is 0.237"),
        ("anchors.times=[1000, 500, 0]", r"anchors must fall from noisy to clean"),
        ("isg.margin=126", r"isg.margin 126 leaves no mid-point"),
    ],
)
def test_numbers_that_this_teacher_has_no_room_for(override, said):
    with pytest.raises(ValueError, match=said):
        read_setup(load_config(TINY, [override]), FLUX)


def test_an_adversary_that_plays_at_one_anchor_is_taken():
    read_setup(load_config(TINY, ["adversarial.least_omega=0.2"]), FLUX)
    read_setup(load_config(TINY, ["adversarial.least_omega=0.9", "adversarial.weight=0"]), FLUX)


@pytest.mark.parametrize("part", ["dmd", "isg"])
def test_a_teacher_is_not_guided_towards_no_prompt(part):
    """Below its number without guidance a pipeline has none; an embedded one is any number."""
    low = [f"{part}.guidance=[0.5, 4]"]
    with pytest.raises(ValueError, match=rf"{part}.guidance 0.5: .*SD3.5 Medium guides above 1"):
        read_setup(load_config(TINY_SD35, low), SD35)
    read_setup(load_config(TINY_SD35, [*low, f"{part}.weight=0"]), SD35)
    read_setup(load_config(TINY_SD35, [f"{part}.guidance=1"]), SD35)
    read_setup(load_config(TINY, low), FLUX)


def test_every_family_without_guidance_is_at_a_number_that_is_taken():
    for family in FAMILIES:
        family.require_guidance("dmd.guidance", family.unguided)
