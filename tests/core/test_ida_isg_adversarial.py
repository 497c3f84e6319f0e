"""IDA, ISG and the adversarial losses on hand-computed cases."""

import numpy as np
import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from senseflow.core import ida
from senseflow.core.adversarial import (
    hinge_discriminator_loss,
    hinge_generator_loss,
    margin,
    omega,
    softplus_discriminator_loss,
    softplus_generator_loss,
)
from senseflow.core.ida import align_, squared_gap
from senseflow.core.isg import isg_loss, reconstruction_error
from senseflow.core.path import FlowPath, VPPath, ode_step


def test_ida_end_points_and_the_point_between():
    for lam, expected in ((1.0, 2.0), (0.0, 10.0), (0.75, 4.0)):
        phi, theta = [torch.full((3,), 2.0)], [torch.full((3,), 10.0)]
        align_(phi, theta, lam)
        assert phi[0].tolist() == [expected] * 3 and theta[0].tolist() == [10.0] * 3


def test_ida_closes_the_gap_in_float32_masters():
    """n steps leave lam^n of the gap, down to float32's resolution; in bf16 it stalls."""
    theta = torch.ones(1000) + torch.rand(1000) * 1e-3
    phi = torch.ones(1000)
    start = (phi - theta).norm()
    for _ in range(100):
        align_([phi], [theta], 0.97)
    assert (phi - theta).norm() / start == pytest.approx(0.97**100, rel=0.05)
    stalled = [torch.ones(1000, dtype=torch.bfloat16)]
    align_(stalled, [theta.bfloat16()], 0.97)
    assert torch.equal(stalled[0], torch.ones(1000, dtype=torch.bfloat16))


def test_ida_refuses_networks_of_different_shapes():
    with pytest.raises(ValueError, match="one architecture"):
        align_([torch.ones(2)], [torch.ones(3)], 0.9)


@pytest.mark.parametrize("portion", [1, 2, 3, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gap_is_measured_over_all_parameters(monkeypatch, portion, dtype):
    """In portions of any size, in float32; a rank may have no row of a parameter."""
    monkeypatch.setattr(ida, "PORTION", portion)
    phi = [torch.zeros(2), torch.ones(1), torch.empty(0, 3), torch.full((1,), 256.0)]
    theta = [torch.ones(2), torch.full((1,), 3.0), torch.empty(0, 3), torch.full((1,), -1.0)]
    before = [p.clone() for p in (*phi, *theta)]
    gap, size = squared_gap([p.to(dtype) for p in phi], [p.to(dtype) for p in theta])
    assert gap.item() == pytest.approx(2 + 4 + 257**2)  # bfloat16 has no 257
    assert size.item() == pytest.approx(2 + 9 + 1)
    assert all(torch.equal(p, q) for p, q in zip(before, (*phi, *theta), strict=True))


def test_isg_on_a_velocity_that_is_not_constant():
    """Teacher v = x sigma, student v = -x, on the segment sigma 1 -> 0.5 with mid-point 0.8, x = 2.

    teacher: x_mid = 2 + (0.8 - 1) (2) = 1.6; student: x_tar = 1.6 + (0.5 - 0.8)(-1.6) = 2.08;
    direct: 2 + (0.5 - 1)(-2) = 3; d = 0.92.
    """
    path = FlowPath()
    x, tau, mid, low = torch.full((1, 1), 2.0), *(torch.tensor([t]) for t in (1000.0, 800.0, 500.0))
    x_mid = ode_step(path, path.read(x * 1.0, x, tau), mid)
    x_target = ode_step(path, path.read(-x_mid, x_mid, mid), low)
    x_direct = ode_step(path, path.read(-x, x, tau), low)
    assert x_mid.item() == pytest.approx(1.6) and x_target.item() == pytest.approx(2.08)
    assert isg_loss(x_direct, x_target, "l2").item() == pytest.approx(0.92**2, rel=1e-5)
    expected = (0.92**2 + 1e-6) ** 0.5 - 1e-3
    assert isg_loss(x_direct, x_target, "charbonnier").item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["l2", "charbonnier"])
def test_isg_moves_only_the_direct_branch(kind):
    direct, target = torch.ones(2, 3, requires_grad=True), torch.zeros(2, 3, requires_grad=True)
    isg_loss(direct, target, kind).backward()
    assert target.grad is None and (direct.grad > 0).all()
    assert isg_loss(target, target, kind).item() == 0


def test_xi_is_a_mean_over_the_elements_of_each_sample():
    x, y = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    expected = ((x.numpy() - y.numpy()) ** 2).mean((1, 2, 3))
    np.testing.assert_allclose(reconstruction_error(x, y), expected, rtol=1e-6)


def test_omega_at_fluxs_anchors():
    tau = torch.tensor([1000.0, 904.5, 759.5, 512.8])
    expected = [(1 - s) ** 2 for s in (1.0, 0.9045, 0.7595, 0.5128)]
    torch.testing.assert_close(omega(FlowPath(), tau), torch.tensor(expected))
    torch.testing.assert_close(omega(FlowPath(), tau, 1.0), torch.tensor(expected).sqrt())


def test_hinge_losses_by_hand():
    real, fake = torch.tensor([[0.5, 2.0], [0.0, 0.0]]), torch.tensor([[-2.0, 1.0], [0.0, 0.0]])
    weight = torch.tensor([1.0, 0.5])
    # sample 1: mean(0.5, 0) + mean(0, 2) = 1.25; sample 2: (1 + 1) / 2
    assert hinge_discriminator_loss(real, fake, weight).item() == pytest.approx((1.25 + 1.0) / 2)
    assert hinge_generator_loss(fake, weight).item() == pytest.approx(0.5 / 2)
    assert margin(real, fake).item() == pytest.approx(0.625 + 0.25)


def test_omega_on_the_vp_path_is_the_share_of_the_image():
    """Never 0: SDXL's top anchor keeps a little of it."""
    abar = torch.linspace(0.999, 0.005, 1000, dtype=torch.float64)
    tau = torch.tensor([999.0, 499.0])
    expected = abar[[999, 499]].float()
    torch.testing.assert_close(omega(VPPath(abar), tau), expected)
    torch.testing.assert_close(omega(VPPath(abar), tau, 1.0), expected.sqrt())


def test_softplus_losses_are_cross_entropies_of_real_and_fake():
    generator = torch.Generator().manual_seed(0)
    real, fake = (5 * torch.randn(2, 3, 4, generator=generator)).requires_grad_()
    entropy = binary_cross_entropy_with_logits
    ones, zeros = torch.ones(3, 4), torch.zeros(3, 4)
    expected = entropy(real, ones) + entropy(fake, zeros)
    torch.testing.assert_close(softplus_discriminator_loss(real, fake), expected)
    torch.testing.assert_close(softplus_generator_loss(fake), entropy(fake, ones))
    far = torch.full((1, 1), 1e4)
    assert softplus_generator_loss(-far).item() == 1e4 and softplus_generator_loss(far).item() == 0


def test_softplus_losses_pull_the_logits_apart_and_the_generators_pushes_up():
    real, fake = (torch.zeros(2, 3, requires_grad=True) for _ in range(2))
    softplus_discriminator_loss(real, fake).backward()
    torch.testing.assert_close(real.grad, torch.full((2, 3), -0.5 / 6))
    torch.testing.assert_close(fake.grad, torch.full((2, 3), 0.5 / 6))
    fake.grad = None
    softplus_generator_loss(fake).backward()
    torch.testing.assert_close(fake.grad, torch.full((2, 3), -0.5 / 6))
