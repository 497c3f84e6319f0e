"""Advantages by hand, and the loss's gradient against closed forms of a Gaussian generator."""

import pytest
import torch
from test_policy import PATHS

from senseflow.core.grpo import group_advantages, grpo_loss
from senseflow.core.path import FlowPath
from senseflow.core.policy import transition


def test_one_reward_by_hand():
    """Two prompts; the spread is that of torch, with M - 1."""
    rewards = torch.tensor([[[1.0, 2.0, 3.0], [0.0, 0.0, 6.0]]])
    root = 3**0.5
    expected = torch.tensor([[-1.0, 0.0, 1.0], [-1 / root, -1 / root, 2 / root]])
    torch.testing.assert_close(group_advantages(rewards, [1.0]), expected)


def test_several_rewards_are_normalised_each_and_then_added():
    one = torch.tensor([[0.3, -1.2, 0.4, 0.9]])
    other = torch.tensor([[5.0, 1.0, 2.0, 2.0]])
    a, b = (group_advantages(rewards[None], [1.0]) for rewards in (one, other))
    both = group_advantages(torch.stack([one, 1000 * other + 7]), [0.5, 2.0])
    torch.testing.assert_close(both, 0.5 * a + 2 * b, rtol=1e-5, atol=1e-6)


def test_advantages_are_clamped_and_carry_no_gradient():
    rewards = torch.zeros(1, 1, 100)
    rewards[..., 0] = 1
    assert group_advantages(rewards, [1.0])[0, 0] == 5
    assert group_advantages(-rewards, [1.0], limit=2.0)[0, 0] == -2
    assert not group_advantages(rewards.requires_grad_(), [1.0]).requires_grad


@pytest.mark.parametrize("value", [0.0, 0.1, -1 / 3, 12345.678, 1e9])
@pytest.mark.parametrize("num", [2, 3, 7, 24])
def test_equal_rewards_are_exactly_zero(value, num):
    assert not group_advantages(torch.full((2, 3, num), value), [1.0, 3.0]).any()


def test_a_group_of_one_is_refused():
    with pytest.raises(ValueError, match="a group of 1: an advantage needs at least 2 samples"):
        group_advantages(torch.ones(1, 4, 1), [1.0])


@pytest.mark.parametrize(
    ("rho", "advantage", "loss", "moves"),
    [
        (1.5, 1.0, -1.2, False),
        (0.5, 1.0, -0.5, True),
        (1.5, -1.0, 1.5, True),
        (0.5, -1.0, 0.8, False),
        (1.1, 2.0, -2.2, True),
        (1.0, -3.0, 3.0, True),
    ],
)
def test_the_clip_by_hand(rho, advantage, loss, moves):
    log_prob = torch.tensor([rho]).log().requires_grad_()
    made = grpo_loss(log_prob, torch.zeros(1), torch.tensor([advantage]), clip=0.2)
    made.backward()
    assert made.item() == pytest.approx(loss)
    assert log_prob.grad.item() == pytest.approx(-rho * advantage if moves else 0)


def test_the_first_gradient_is_reinforces():
    """-A n (alpha / sigma) / numel, over the transitions, with respect to x_0 at eta 1."""
    path, noise = FlowPath(), torch.randn(4, 2, 3)
    s, advantages = torch.tensor([904.0, 760.0, 513.0, 100.0]), torch.tensor([1.0, -2.0, 0.5, 3.0])
    x_t, t = torch.randn(4, 2, 3), torch.full((4,), 950.0)
    v = torch.randn(4, 2, 3)
    denoised = path.read(v, x_t, t)
    denoised.x_0.requires_grad_()
    law = transition(path, denoised, s, 1.0)
    log_prob = law.log_prob(law.draw(noise))
    grpo_loss(log_prob, log_prob, advantages, clip=1e-5).backward()
    alpha, sigma = path.alpha_sigma(s)
    expected = -(advantages * alpha / sigma).view(4, 1, 1) * noise / 6 / 4
    torch.testing.assert_close(denoised.x_0.grad, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("eta", [0.3, 0.7, 1.0])
@pytest.mark.parametrize("name", ["flow", "vp"])
def test_on_average_it_is_the_gradient_of_the_expected_reward(name, eta):
    """E[-|x_s - c|^2] is -|mean - c|^2 - numel std^2; over 10^5 draws, in the network's output."""
    path, num = PATHS[name], 100_000
    output, x_t = torch.tensor([[0.4, -0.7]], requires_grad=True), torch.tensor([[1.1, -0.2]])
    wanted = torch.tensor([[0.5, -1.5]])
    law = transition(
        path, path.read(output, x_t, torch.tensor([749.0])), torch.tensor([499.0]), eta
    )
    (slope,) = torch.autograd.grad(law.mean.sum(), output, retain_graph=True)
    expected = (law.mean - wanted).square().sum() / 2  # a log-probability is by the element, of 2
    (exact,) = torch.autograd.grad(expected, output, retain_graph=True)
    noise = torch.randn(num, 2, generator=torch.Generator().manual_seed(0))
    x_s = law.draw(noise)
    rewards = -(x_s - wanted).square().sum(1).detach()
    advantages, log_prob = rewards - rewards.mean(), law.log_prob(x_s)
    (ours,) = torch.autograd.grad(grpo_loss(log_prob, log_prob, advantages, clip=1e-5), output)
    one_draws = advantages[:, None] * noise * slope / law.std.detach() / 2
    error = one_draws.std(0) / num**0.5
    assert ((ours - exact).abs() < 3 * error).all() and (exact.abs() > 10 * error).all()
