"""Both noise paths against their definitions and against diffusers' own schedulers."""

from itertools import pairwise

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


def test_vp_steps_of_an_exact_gaussian_teacher_converge_to_its_flow():
    """Data N(m, s^2): the flow keeps (x_t - alpha m) / std_t; the error of n steps falls as 1/n."""
    path, mean, std = sdxl_path(), 0.7, 0.5
    start = torch.linspace(-2, 2, 9).view(1, 9)

    def spread(t):
        alpha, sigma = path.alpha_sigma(t)
        return (alpha**2 * std**2 + sigma**2).sqrt()

    def walk(num_steps):
        steps = torch.linspace(999, path.clean, num_steps + 1)[:, None]
        x_t = start
        for t, s in pairwise(steps):
            alpha, sigma = path.alpha_sigma(t)
            eps = sigma / spread(t) ** 2 * (x_t - alpha * mean)
            x_t = ode_step(path, path.read(eps, x_t, t), s)
        return x_t

    top = torch.tensor([999.0])
    alpha, _ = path.alpha_sigma(top)
    exact = mean + std / spread(top) * (start - alpha * mean)
    errors = [(walk(n) - exact).abs().max().item() for n in (10, 100, 1000)]
    assert errors[2] < 6e-3
    assert errors[1] / errors[0] < 0.2 and errors[2] / errors[1] < 0.2
