"""examples/toy_2d.py: its teacher, its measures, and a short run."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from python import PYTHON
from scipy import stats

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import toy_2d
from toy_2d_report import energy_distance, posterior_mean


def test_the_teacher_is_the_score_of_its_own_density():
    """Tweedie: E[x_0 | x_t] = (x_t + sigma^2 grad log p_t) / alpha, by autograd on the density."""
    teacher, sigma = toy_2d.Mixture(), 0.6
    x_t = torch.randn(50, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    variance = (0.4 * toy_2d.SPREAD) ** 2 + sigma**2
    parts = torch.distributions.MultivariateNormal(0.4 * teacher.means, variance * torch.eye(2))
    uniform = torch.distributions.Categorical(torch.ones(toy_2d.MODES))
    mixture = torch.distributions.MixtureSameFamily(uniform, parts)
    (score,) = torch.autograd.grad(mixture.log_prob(x_t).sum(), x_t)
    exact = (x_t + sigma**2 * score) / 0.4
    found = toy_2d.denoise(teacher, x_t.detach(), toy_2d.at(600, 50)).x_0
    torch.testing.assert_close(found, exact.detach(), atol=1e-4, rtol=1e-4)


def test_energy_distance_is_scipys():
    """On a line, where scipy's is the square root of half of it."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(300, generator=g), 0.5 + 2 * torch.randn(300, generator=g)
    plane = [torch.stack([a, torch.zeros(300)], 1)[None] for a in (x, y)]
    found = float(energy_distance(*plane))
    assert found == pytest.approx(stats.energy_distance(x, y) ** 2, rel=1e-3)


def test_the_posterior_mean_of_gaussian_samples_is_wieners():
    g = torch.Generator().manual_seed(0)
    samples = 1.5 * torch.randn(1, 40000, 2, generator=g)
    x_t = torch.tensor([[[0.5, -1.0], [0.0, 0.3]]])
    exact = x_t * 0.4 * 1.5**2 / (0.4**2 * 1.5**2 + 0.6**2)
    torch.testing.assert_close(posterior_mean(x_t, samples, 0.4, 0.6), exact, atol=0.03, rtol=0)


class Point(torch.nn.Module):
    """A teacher whose data are one point: its ODE is a straight line."""

    def forward(self, x_t, t):
        return (x_t - torch.tensor([0.3, -1.0])) / (t[:, None] / 1000)


def test_isg_is_nothing_where_the_ode_is_straight_and_something_where_it_bends():
    x_tau = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    tau = toy_2d.at(toy_2d.ANCHORS.times[2], 64)
    losses = [
        float(toy_2d.guidance(2, x_tau, toy_2d.denoise(net, x_tau, tau), net, net, 20.0))
        for net in (Point(), toy_2d.Mixture())
    ]
    assert losses[0] < 1e-8 and losses[1] > 1e-3


def test_a_short_run_leaves_a_picture(tmp_path):
    words = ["examples/toy_2d.py", "--output", tmp_path, "--seeds", 2, "--iterations", 8]
    result = subprocess.run([PYTHON, *map(str, words)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert [line.split("energy")[0].strip() for line in result.stdout.splitlines()[:4]] == [
        variant.name for variant in toy_2d.VARIANTS
    ]
    assert Image.open(tmp_path / "toy_2d.png").size == (960, 800)
    bad = [PYTHON, "examples/toy_2d.py", "--seeds", "0"]
    assert subprocess.run(bad, capture_output=True).returncode == 2
