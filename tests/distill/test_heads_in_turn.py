"""Heads one after the other: the losses and gradients of all heads in one piece."""

from dataclasses import replace

import pytest
import torch
from toy import toy_batch, toy_config, toy_distillation

from senseflow.distill.adversaries import augment
from senseflow.distill.algorithm import discriminator_backward, generate
from senseflow.distill.measures import Measures
from senseflow.distill.state import Distillation, Sample, Turn


def viewed(reference: str) -> tuple[Distillation, Sample]:
    """A micro-batch that the adversary has looked at, with x as a leaf of its graph."""
    d = toy_distillation(toy_config(adversarial={"reference": reference}))
    turn = Turn(
        iteration=6, anchors=d.anchors, anchor=2, simulate=False, generator=True, adversarial=True
    )
    sample = generate(d, turn, toy_batch()).detach()
    x = sample.x.requires_grad_(True)
    sample = replace(sample, denoised=replace(sample.denoised, x_0=x))
    return d, d.discriminator.view(d, turn, sample, Measures())


def omega(d: Distillation, sample: Sample) -> torch.Tensor:
    """alpha^2 of a linear flow, (B, 1)."""
    return (1 - sample.tau[:, None] / 1000) ** 2


@pytest.mark.parametrize("reference", ["paired", "none"])
def test_the_generators_loss_is_that_of_all_heads_at_once(reference):
    d, sample = viewed(reference)
    loss = d.discriminator.generator_loss(d, sample)
    (gradient,) = torch.autograd.grad(3 * loss, sample.x, retain_graph=True)
    assert all(
        p.grad is None and p.requires_grad for p in d.discriminator.heads.network.parameters()
    )
    views = sample.views
    logits = d.discriminator.heads.network(views.fake, views.text, views.reference)
    whole = -(omega(d, sample) * logits).mean()
    (wanted,) = torch.autograd.grad(3 * whole, sample.x)
    torch.testing.assert_close(loss.detach(), whole.detach())
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-8)
    assert wanted.abs().amax((1, 2, 3)).gt(0).all()


@pytest.mark.parametrize("reference", ["paired", "none"])
def test_the_heads_gradients_are_those_of_all_heads_at_once(reference):
    d, sample = viewed(reference)
    sample, heads, measures = sample.detach(), d.discriminator.heads.network, Measures()
    discriminator_backward(d, sample, 2, False, measures)
    gradients = {name: p.grad for name, p in heads.named_parameters()}
    heads.zero_grad()
    views = sample.views
    real = d.discriminator.backbone(augment(d, sample, views.real, "augment real"))
    logits = [heads(maps, views.text, views.reference) for maps in (views.fake, real)]
    places = (1 + logits[0]).relu() + (1 - logits[1]).relu()
    loss = (omega(d, sample) * places).mean()
    (d.config.adversarial.discriminator_weight * loss / 2).backward()
    torch.testing.assert_close(measures.sums["loss/discriminator"], loss.detach())
    margin = (logits[1].mean() - logits[0].mean()).detach()
    torch.testing.assert_close(measures.sums["discriminator/margin"], margin)
    for name, parameter in heads.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-7)
    assert sum(p.grad.abs().sum() > 0 for p in heads.parameters()) > len(gradients) / 2
