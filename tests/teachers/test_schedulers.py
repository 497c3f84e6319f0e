"""x0 and cps against diffusers' own schedulers, and the sigmas of 1, 2, K and 2K steps."""

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from senseflow.teachers.schedulers import (
    FlowMatchEulerX0Scheduler,
    VPCpsScheduler,
    flow_scheduler,
    own_sigmas,
)

ANCHORS = [1.0, 0.9045, 0.7595, 0.5128]
TIMESTEPS = [999, 749, 499, 249]
SDXL_BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
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


def cps(eta: float, vp: bool = False):
    """At the anchors of either path."""
    if not vp:
        scheduler = flow_scheduler(stock(), "cps", exact=True, eta=eta)
        scheduler.set_timesteps(sigmas=ANCHORS)
        return scheduler
    scheduler = VPCpsScheduler(**SDXL_BETAS).with_eta(eta)
    scheduler.set_timesteps(timesteps=TIMESTEPS)
    return scheduler


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("vp", [False, True])
def test_the_ends_of_cps_are_euler_and_x0(vp, eta):
    """Steps of the stock schedulers, from the same samples, with the same generator."""
    if vp:
        theirs = LCMScheduler(**SDXL_BETAS, original_inference_steps=1000)
        if eta == 0:
            theirs = EulerDiscreteScheduler(**SDXL_BETAS, timestep_spacing="leading")
        theirs.set_timesteps(timesteps=TIMESTEPS)
    else:
        theirs = stock(use_dynamic_shifting=False, shift=1.0, stochastic_sampling=eta == 1)
        theirs.set_timesteps(sigmas=ANCHORS)
    ours, x = cps(eta, vp), torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    for number, t in enumerate(theirs.timesteps):
        v = x.sin()
        own = ours.step(v, t, x, generator=generators[0]).prev_sample
        # EulerDiscreteScheduler counts in x / alpha, and so do its steps
        scaled = vp and eta == 0
        before, after = (
            (1 + theirs.sigmas[i] ** 2).sqrt() if scaled else 1.0 for i in (number, number + 1)
        )
        x = theirs.step(v, t, x * before, generator=generators[1]).prev_sample / after
        torch.testing.assert_close(own, x, rtol=1e-6, atol=1e-6 * float(x.abs().max()))
        x = own


@pytest.mark.parametrize("vp", [False, True])
def test_cps_between_its_ends_is_the_equation(vp):
    """Written out in float64, with the noise of one generator, step by step."""
    levels = torch.tensor(TIMESTEPS if vp else ANCHORS)
    abar = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000).double() ** 2, 0)
    alphas = [*(abar[levels].sqrt() if vp else 1 - levels.double()), torch.tensor(1.0)]
    sigmas = [*((1 - abar[levels]).sqrt() if vp else levels.double()), torch.tensor(0.0)]
    scheduler, x = cps(0.7, vp), torch.randn(1, 4, 8)
    scheduler.generators = [torch.Generator().manual_seed(5)]
    generator, exact = torch.Generator().manual_seed(5), x.double()
    kept, fresh = np.cos(0.35 * np.pi), np.sin(0.35 * np.pi)
    for i, t in enumerate(scheduler.timesteps):
        output, exact_output = x.cos(), exact.cos()
        x = scheduler.step(output, t, x, return_dict=False)[0]
        x_0 = exact - sigmas[i] * exact_output
        x_0, eps = (x_0 / alphas[i], exact_output) if vp else (x_0, x_0 + exact_output)
        noise = torch.randn(1, 4, 8, generator=generator).double()
        exact = alphas[i + 1] * x_0 + sigmas[i + 1] * (kept * eps + fresh * noise)
    torch.testing.assert_close(x.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("vp", [False, True])
def test_cps_steps_in_float32_whatever_the_networks_type(vp):
    x, v = torch.randn(2, 1, 4, 8).bfloat16()
    half, full = cps(0.7, vp), cps(0.7, vp)
    for scheduler in (half, full):
        scheduler.generators = [torch.Generator().manual_seed(5)]
    t = half.timesteps[0]
    (ours,), (exact,) = (
        half.step(v, t, x, return_dict=False),
        full.step(v.float(), t, x.float(), return_dict=False),
    )
    assert ours.dtype == torch.bfloat16 and torch.equal(ours, exact.bfloat16())


@pytest.mark.parametrize(("sampler", "eta"), [("x0", None), ("cps", 0.7)])
def test_each_row_follows_its_own_generator(sampler, eta):
    sample = torch.randn(3, 6, 16)

    def last(rows: list[int]) -> torch.Tensor:
        scheduler = flow_scheduler(stock(), sampler, exact=True, eta=eta)
        scheduler.set_timesteps(sigmas=ANCHORS)
        scheduler.generators = [torch.Generator().manual_seed(10 + row) for row in rows]
        return roll(scheduler, sample[rows])[-2]  # the last sample with noise in it

    whole = last([0, 1, 2])
    for row in range(3):
        assert torch.equal(last([row])[0], whole[row])
    assert torch.equal(last([2, 0]), whole[[2, 0]])


@pytest.mark.parametrize(("sampler", "eta"), [("x0", None), ("cps", 0.7)])
def test_a_wrong_number_of_generators_is_an_error(sampler, eta):
    scheduler = flow_scheduler(stock(), sampler, exact=True, eta=eta)
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
