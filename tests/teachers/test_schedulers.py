"""The x0 scheduler against diffusers' own, and the sigmas of 1, 2, K and 2K steps."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from senseflow.teachers.schedulers import FlowMatchEulerX0Scheduler, flow_scheduler, own_sigmas

ANCHORS = [1.0, 0.9045, 0.7595, 0.5128]
FLUX_SCHEDULER = {
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}


def stock(**changes) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler.from_config({**FLUX_SCHEDULER, **changes})


def roll(scheduler, sample, **step):
    """Four steps with a velocity that depends on the sample."""
    path = [sample]
    for t in scheduler.timesteps:
        path.append(scheduler.step(path[-1].sin(), t, path[-1], return_dict=False, **step)[0])
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_x0_equals_the_stock_stochastic_scheduler_step_for_step(dtype):
    sample = torch.randn(2, 6, 16, dtype=dtype)
    ours = FlowMatchEulerX0Scheduler.from_config(stock().config)
    theirs = stock(stochastic_sampling=True)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(sigmas=[1, 0.75, 0.5, 0.25], mu=1.15)
    a = roll(ours, sample, generator=torch.Generator().manual_seed(3))
    b = roll(theirs, sample, generator=torch.Generator().manual_seed(3))
    assert len(a) == 5
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_x0_is_the_equation():
    scheduler = flow_scheduler(stock(), "x0", exact=True)
    scheduler.set_timesteps(sigmas=ANCHORS, mu=1.15)
    x, v = torch.randn(1, 4, 8), torch.randn(1, 4, 8)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(1))
    got = scheduler.step(v, scheduler.timesteps[0], x, generator=generator).prev_sample
    torch.testing.assert_close(got, (1 - 0.9045) * (x - v) + 0.9045 * noise)


def test_each_row_follows_its_own_generator():
    sample = torch.randn(3, 6, 16)

    def last(rows: list[int]) -> torch.Tensor:
        scheduler = flow_scheduler(stock(), "x0", exact=True)
        scheduler.set_timesteps(sigmas=ANCHORS)
        scheduler.generators = [torch.Generator().manual_seed(10 + row) for row in rows]
        return roll(scheduler, sample[rows])[-2]  # the last sample with noise in it

    whole = last([0, 1, 2])
    for row in range(3):
        assert torch.equal(last([row])[0], whole[row])
    assert torch.equal(last([2, 0]), whole[[2, 0]])


def test_a_wrong_number_of_generators_is_an_error():
    scheduler = flow_scheduler(stock(), "x0", exact=True)
    scheduler.set_timesteps(sigmas=ANCHORS)
    scheduler.generators = [torch.Generator()]
    with pytest.raises(ValueError, match="1 generators for a batch of 2"):
        roll(scheduler, torch.randn(2, 4, 8))


def test_its_saved_config_samples_the_same_in_the_stock_class(tmp_path):
    FlowMatchEulerX0Scheduler.from_config(stock().config).save_pretrained(tmp_path)
    assert FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path).config.stochastic_sampling


@pytest.mark.parametrize("sampler", ["x0", "euler"])
@pytest.mark.parametrize("dynamic", [True, False])
def test_sigmas_are_taken_as_they_are(sampler, dynamic):
    """Passing shifted sigmas to the base's own scheduler would shift them twice."""
    own = stock(use_dynamic_shifting=dynamic, stochastic_sampling=True, use_beta_sigmas=True)
    scheduler = flow_scheduler(own, sampler, exact=True)
    scheduler.set_timesteps(sigmas=ANCHORS, mu=0.63)
    expected = torch.tensor([*ANCHORS, 0.0])
    assert torch.equal(scheduler.sigmas, expected)
    assert torch.equal(scheduler.timesteps, 1000 * expected[:-1])
    assert scheduler.config.stochastic_sampling == (sampler == "x0")


def test_default_anchors_are_the_pipelines_own_four_steps_at_1024():
    scheduler = stock()
    scheduler.set_timesteps(sigmas=np.linspace(1, 0.25, 4), mu=calculate_shift(4096))
    assert own_sigmas(stock().config) == scheduler.sigmas[:-1].tolist()
    assert own_sigmas(stock().config) == pytest.approx(ANCHORS, abs=5e-5)


def test_default_anchors_of_a_constant_shift():
    config = stock(use_dynamic_shifting=False, shift=3.1582).config
    assert own_sigmas(config) == pytest.approx(ANCHORS, abs=5e-5)
