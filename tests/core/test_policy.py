"""The sampler as a policy, against torch.distributions and the two samplers that are its ends."""

from itertools import pairwise

import pytest
import torch
from torch.distributions import Independent, Normal

from senseflow.core.path import Denoised, FlowPath, Path, VPPath, add_noise, ode_step
from senseflow.core.policy import transition

ABAR = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)
PATHS = {"flow": FlowPath(), "shifted": FlowPath(shift=3.0), "vp": VPPath(ABAR)}
ETAS = [0.0, 0.3, 0.7, 1.0]
TIMES = (999.0, 749.0, 499.0, 249.0)


@pytest.fixture(params=list(PATHS))
def path(request) -> Path:
    return PATHS[request.param]


def predicted(num: int = 3) -> Denoised:
    generator = torch.Generator().manual_seed(0)
    return Denoised(*torch.randn(2, num, 4, 5, generator=generator))


def at(t: float, num: int = 3) -> torch.Tensor:
    return torch.full((num,), t)


@pytest.mark.parametrize("eta", ETAS[1:])
def test_the_density_is_torchs(eta, path):
    law = transition(path, predicted(), torch.tensor(TIMES[1:]), eta)
    x_s = law.draw(torch.randn(3, 4, 5))
    theirs = Independent(Normal(law.mean, law.std.expand_as(law.mean)), 2).log_prob(x_s)
    torch.testing.assert_close(law.log_prob(x_s), theirs / 20)


def test_the_ends_are_the_ode_and_the_x0_sampler(path):
    denoised, noise, s = predicted(), torch.randn(3, 4, 5), torch.tensor(TIMES[1:])
    euler = transition(path, denoised, s, 0.0).draw(noise)
    torch.testing.assert_close(euler, ode_step(path, denoised, s), rtol=0, atol=1e-6)
    x0 = transition(path, denoised, s, 1.0).draw(noise)
    torch.testing.assert_close(x0, add_noise(path, denoised.x_0, noise, s), rtol=0, atol=1e-6)


@pytest.mark.parametrize("eta", ETAS)
def test_every_state_has_the_noise_of_its_time(eta, path):
    """With a network that knows x_0, what is left of x_s is sigma_s of unit noise, step by step."""
    num, generator = 40_000, torch.Generator().manual_seed(1)
    x_0 = torch.full((num, 1), 2.0)
    x = add_noise(path, x_0, torch.randn(num, 1, generator=generator), at(TIMES[0], num))
    for t, s in pairwise(TIMES):
        alpha, sigma = path.alpha_sigma(at(t, num))
        eps = (x - alpha[:, None] * x_0) / sigma[:, None]
        x = transition(path, Denoised(x_0, eps), at(s, num), eta).draw(
            torch.randn(num, 1, generator=generator)
        )
        alpha, sigma = (float(a[0]) for a in path.alpha_sigma(at(s)))
        assert float(x.mean()) == pytest.approx(2 * alpha, abs=4 * sigma / num**0.5)
        assert float(x.std()) == pytest.approx(sigma, rel=4 / (2 * num) ** 0.5)


def test_the_gradient_is_that_of_the_mean_alone(path):
    """alpha n / std / numel for x_0 at eta 1, though x_s is drawn from the same law."""
    x_0, noise = torch.randn(3, 4, 5, requires_grad=True), torch.randn(3, 4, 5)
    s = torch.tensor(TIMES[1:])
    law = transition(path, Denoised(x_0, torch.zeros(3, 4, 5)), s, 1.0)
    law.log_prob(law.draw(noise)).sum().backward()
    alpha, sigma = (a.view(3, 1, 1) for a in path.alpha_sigma(s))
    torch.testing.assert_close(x_0.grad, alpha / sigma * noise / 20, rtol=1e-4, atol=1e-6)


def test_a_rewards_gradient_goes_through_the_last_step_to_the_output(path):
    """Of R = -|x - c|^2: -2 (x_0 - c) times d x_0 / d output, which is -sigma or -sigma / alpha."""
    output, x_t, wanted = torch.randn(3, 3, 4, 5)
    output.requires_grad_()
    t = torch.tensor(TIMES[:3])
    denoised = path.read(output, x_t, t)
    x = transition(path, denoised, at(path.clean), 0.7).draw(torch.randn(3, 4, 5))
    (-(x - wanted).square().sum()).backward()
    alpha, sigma = (a.view(3, 1, 1) for a in path.alpha_sigma(t))
    slope = -sigma / alpha if isinstance(path, VPPath) else -sigma
    torch.testing.assert_close(output.grad, -2 * (denoised.x_0 - wanted).detach() * slope)


def test_the_last_step_is_the_prediction_and_has_no_density(path):
    denoised, noise = predicted(), torch.randn(3, 4, 5)
    law = transition(path, denoised, at(path.clean), 0.7)
    assert torch.equal(law.draw(noise), denoised.x_0)
    for none in (law, transition(path, denoised, at(499.0), 0.0)):
        assert not none.log_prob(none.draw(noise)).isfinite().any()
