"""Clipping, the no-op step and the learning-rate schedule."""

import copy

import pytest
import torch

from senseflow.config.sections import LrSchedulerConfig, OptimizerConfig
from senseflow.optim.trained import Trained, lr_factor

CONFIG = OptimizerConfig(lr=0.1, fake_score_lr=0.1, discriminator_lr=0.1, max_grad_norm=1.0)


def stepped(grads: list[float]) -> tuple[Trained, torch.Tensor]:
    network = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.ones_(network.weight)
    trained = Trained.build(network, 0.1, CONFIG)
    network.weight.grad = torch.tensor([grads])
    return trained, trained.step()


def test_step_returns_the_norm_before_clipping_and_clears_gradients():
    trained, norm = stepped([3.0, 4.0])
    assert norm.item() == 5.0 and trained.network.weight.grad is None
    moment = trained.optimizer.state_dict()["state"][0]["exp_avg"]
    torch.testing.assert_close(moment, torch.tensor([[0.06, 0.08]]))  # 0.1 x the clipped gradient


def test_small_gradients_are_not_scaled():
    trained, _ = stepped([0.3, 0.4])
    moment = trained.optimizer.state_dict()["state"][0]["exp_avg"]
    torch.testing.assert_close(moment, torch.tensor([[0.03, 0.04]]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_gradient_changes_neither_weights_nor_state(bad):
    trained, _ = stepped([0.3, 0.4])
    weights = trained.network.weight.detach().clone()
    state = copy.deepcopy(trained.optimizer.state_dict())
    trained.network.weight.grad = torch.tensor([[bad, 1.0]])
    assert not torch.isfinite(trained.step())
    assert torch.equal(trained.network.weight, weights)
    for key, value in state["state"][0].items():
        assert torch.equal(trained.optimizer.state_dict()["state"][0][key], value), key
    trained.network.weight.grad = torch.ones(1, 2)  # and the next good one does
    trained.step()
    assert not torch.equal(trained.network.weight, weights)


def test_adamw_against_torchs_own_reference():
    trained, _ = stepped([0.3, 0.4])
    reference = torch.nn.Parameter(torch.ones(1, 2))
    plain = torch.optim.AdamW([reference], lr=0.1, weight_decay=0.0, foreach=False, fused=False)
    reference.grad = torch.tensor([[0.3, 0.4]])
    plain.step()
    torch.testing.assert_close(trained.network.weight.detach(), reference.detach())


def test_flux_schedule_rises_from_half_over_500_iterations_and_stays():
    schedule = LrSchedulerConfig(warmup_iterations=500, start_factor=0.5)
    factors = [1e-5 * lr_factor(i, 12000, schedule) for i in (0, 250, 500, 12000)]
    assert factors == pytest.approx([5e-6, 7.5e-6, 1e-5, 1e-5])


def test_decay_ends_at_its_factor():
    schedule = LrSchedulerConfig(decay_iterations=50, end_factor=0.1)
    assert [lr_factor(i, 100, schedule) for i in (50, 75, 100)] == pytest.approx([1, 0.55, 0.1])
