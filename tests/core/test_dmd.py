"""The DMD gradient against Gaussians, whose scores and divergences are known exactly."""

import pytest
import torch

from senseflow.core.dmd import dmd_gradient, dmd_loss, fake_score_loss, kl_gradient
from senseflow.core.guidance import guide
from senseflow.core.path import FlowPath, VPPath

T = 600.0
REAL_MEAN, FAKE_MEAN = torch.tensor([1.0, -2.0]).double(), torch.tensor([0.3, 0.5]).double()
REAL_ROOT = torch.tensor([[1.2, 0.0], [0.7, 0.5]]).double()
FAKE_ROOT = torch.tensor([[0.6, 0.0], [-0.4, 0.9]]).double()

PATHS = [FlowPath(), VPPath(torch.linspace(0.9999, 0.005, 1000, dtype=torch.float64))]


def alpha_sigma(path):
    return (float(a) for a in path.alpha_sigma(torch.tensor([T])))


def noised_covariance(path, root):
    alpha, sigma = alpha_sigma(path)
    return alpha**2 * root @ root.T + sigma**2 * torch.eye(2).double()


def posterior_mean(path, x_t, mean, root):
    """E[x_0 | x_t] for x_0 ~ N(mean, root root^T)."""
    alpha, _ = alpha_sigma(path)
    gain = alpha * root @ root.T @ torch.linalg.inv(noised_covariance(path, root))
    return mean + (x_t - alpha * mean) @ gain.T


def kl_at_t(path, mean, root):
    """KL(N_fake,t || N_real,t), the textbook formula, as a function of the fake's parameters."""
    alpha, sigma = alpha_sigma(path)
    fake = alpha**2 * root @ root.T + sigma**2 * torch.eye(2).double()
    real = noised_covariance(path, REAL_ROOT)
    d = alpha * (REAL_MEAN - mean)
    solve = torch.linalg.solve
    trace, quadratic = torch.trace(solve(real, fake)), d @ solve(real, d)
    return 0.5 * (trace - 2 + quadratic + torch.logdet(real) - torch.logdet(fake))


@pytest.mark.parametrize("path", PATHS)
def test_kl_gradient_is_the_gradient_of_the_closed_form_kl(path):
    """x = m + L z, x_t = alpha x + sigma eps; the gradients with respect to m and L are moments of
    an affine function of (z, eps), exact on the cubature points of a 4-d Gaussian."""
    alpha, sigma = alpha_sigma(path)
    points = torch.cat([torch.eye(4), -torch.eye(4)]).double() * 2  # mean 0, covariance 1
    z, eps = points[:, :2], points[:, 2:]
    x = FAKE_MEAN + z @ FAKE_ROOT.T
    x_t = alpha * x + sigma * eps
    real = posterior_mean(path, x_t, REAL_MEAN, REAL_ROOT)
    fake = posterior_mean(path, x_t, FAKE_MEAN, FAKE_ROOT)
    g = kl_gradient(path, fake, real, torch.full((8,), T))

    mean = FAKE_MEAN.clone().requires_grad_(True)
    root = FAKE_ROOT.clone().requires_grad_(True)
    kl_at_t(path, mean, root).backward()
    torch.testing.assert_close(g.mean(0), mean.grad, atol=1e-5, rtol=1e-4)
    # The covariance enters as L L^T: compare the gradient along z.
    torch.testing.assert_close(g.T @ z / 8, root.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("path", PATHS)
def test_normalised_gradient_is_proportional_to_the_exact_one_per_sample(path):
    x_t = torch.randn(6, 2).double()
    real = posterior_mean(path, x_t, REAL_MEAN, REAL_ROOT)
    fake = posterior_mean(path, x_t, FAKE_MEAN, FAKE_ROOT)
    exact = kl_gradient(path, fake, real, torch.full((6,), T))
    ratio = dmd_gradient(x_t, fake, real) / exact
    assert (ratio > 0).all()
    torch.testing.assert_close(ratio[:, 0], ratio[:, 1])


def test_normaliser_is_the_mean_distance_over_all_but_the_batch():
    x, real, fake = (
        torch.zeros(1, 2, 2, 1),
        torch.tensor([1.0, 2, 3, 6]).view(1, 2, 2, 1),
        torch.zeros(1),
    )
    torch.testing.assert_close(dmd_gradient(x, fake, real), -real / 3)


def test_a_sample_on_the_teachers_prediction_has_a_finite_gradient():
    x = torch.ones(1, 3)
    assert torch.isfinite(dmd_gradient(x, x + 0.1, x)).all()
    assert torch.isnan(dmd_gradient(x, x * float("nan"), x)).all()  # a NaN is never hidden


def test_loss_has_the_given_gradient_over_numel_and_nothing_else_learns():
    x = torch.randn(3, 4, 2, 2, requires_grad=True)
    g = torch.randn(3, 4, 2, 2, requires_grad=True)
    dmd_loss(x, g).backward()
    torch.testing.assert_close(x.grad, g.detach() / x.numel())
    assert g.grad is None


def test_fake_score_loss_is_in_the_networks_own_prediction():
    x_0, eps, out = torch.randn(3, 2, 4, 2, 2)
    out.requires_grad_(True)
    flow, vp = FlowPath(), PATHS[1]
    torch.testing.assert_close(
        fake_score_loss(out, x_0, eps, flow), torch.nn.functional.mse_loss(out, eps - x_0)
    )
    torch.testing.assert_close(
        fake_score_loss(out, x_0, eps, vp), torch.nn.functional.mse_loss(out, eps)
    )
    x_0.requires_grad_(True)
    fake_score_loss(out, x_0, eps, flow).backward()
    assert x_0.grad is None


def test_guidance_extrapolates_from_the_unconditional_prediction():
    uncond, cond = torch.randn(2, 2, 4, 3, 3)
    scale = torch.tensor([1.0, 7.5])
    guided = guide(uncond, cond, scale)
    torch.testing.assert_close(guided[0], cond[0])
    torch.testing.assert_close(guided[1], 7.5 * cond[1] - 6.5 * uncond[1])
