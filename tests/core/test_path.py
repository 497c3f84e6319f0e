"""Both noise paths against their definitions and against diffusers' own schedulers."""

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from senseflow.core.path import FlowPath, VPPath, add_noise, ode_step, shift_sigma

SDXL = dict(
    num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
)


def sdxl_path():
    return VPPath(DDIMScheduler(**SDXL).alphas_cumprod)


@pytest.mark.parametrize("path", [FlowPath(), FlowPath(shift=3.0), sdxl_path()])
def test_reading_the_exact_output_gives_both_ends(path):
    x_0, eps = torch.randn(2, 5, 4, 3, 3)
    t = torch.tensor([999.0, 700.0, 333.0, 20.0, 1.0])
    x_t = add_noise(path, x_0, eps, t)
    denoised = path.read(path.target(x_0, eps), x_t, t)
    torch.testing.assert_close(denoised.x_0, x_0, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(denoised.eps, eps, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("path", [FlowPath(), FlowPath(shift=3.0), sdxl_path()])
def test_clean_time_is_exactly_no_noise(path):
    alpha, sigma = path.alpha_sigma(torch.tensor([path.clean]))
    assert (alpha.item(), sigma.item()) == (1.0, 0.0)


def test_flow_step_is_eulers():
    path, x_t, v = FlowPath(), torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    t, s = torch.tensor([900.0, 400.0]), torch.tensor([700.0, 0.0])
    expected = x_t + ((s - t) / 1000).view(-1, 1, 1, 1) * v
    torch.testing.assert_close(ode_step(path, path.read(v, x_t, t), s), expected)


def test_flow_step_is_diffusers():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(4)
    x_t, v = torch.randn(1, 4, 3, 3), torch.randn(1, 4, 3, 3)
    expected = scheduler.step(v, scheduler.timesteps[0], x_t).prev_sample
    t, s = 1000 * scheduler.sigmas[0:1], 1000 * scheduler.sigmas[1:2]
    path = FlowPath()
    torch.testing.assert_close(ode_step(path, path.read(v, x_t, t), s), expected)


def test_vp_step_is_ddim_of_diffusers():
    scheduler = DDIMScheduler(**SDXL, set_alpha_to_one=False, clip_sample=False)
    scheduler.set_timesteps(4)
    x_t, eps = torch.randn(1, 4, 3, 3), torch.randn(1, 4, 3, 3)
    t = scheduler.timesteps[1]
    expected = scheduler.step(eps, t, x_t, eta=0.0).prev_sample
    path = sdxl_path()
    denoised = path.read(eps, x_t, t.float().view(1))
    torch.testing.assert_close(
        ode_step(path, denoised, t.float().view(1) - 250), expected, atol=1e-5, rtol=1e-4
    )


def test_shift_has_fixed_ends_and_is_sd3s():
    sigma = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    torch.testing.assert_close(shift_sigma(sigma, 3.0), torch.tensor([0.0, 0.5, 0.75, 0.9, 1.0]))
