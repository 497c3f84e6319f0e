"""DMD2's adversary in the iteration: what it trains, what it leaves alone, and what it looks at."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import sdxl_pipeline
import torch
from teacher_parts import CPU, built, settings_of
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from senseflow.common.ranks import start_ranks
from senseflow.config.sections import AdversarialConfig, DmdConfig, FakeScoreConfig, OptimizerConfig
from senseflow.core.draws import Draws
from senseflow.core.path import add_noise
from senseflow.data.sampler import Batch
from senseflow.distill.adversaries import BottleneckDiscriminator
from senseflow.distill.algorithm import discriminator_backward, fake_score_backward
from senseflow.distill.bottleneck import ClassifierHead, add_encoder_pass
from senseflow.distill.measures import Measures
from senseflow.distill.state import Distillation, Sample, denoise, times
from senseflow.engine.parallel import shard
from senseflow.optim.trained import Trained
from senseflow.teachers.sdxl.adapter import blocks_of
from senseflow.teachers.sdxl.family import SDXL

UP_HALF = ("up_blocks.", "conv_norm_out.", "conv_out.")
OPTIMIZER = OptimizerConfig(lr=1e-3, fake_score_lr=1e-3, discriminator_lr=1e-3)
CONFIG = SimpleNamespace(
    adversarial=AdversarialConfig(
        kind="bottleneck", weight=0.005, discriminator_weight=0.01, downsamplings=1, norm_groups=4
    ),
    dmd=DmdConfig(weight=1.0, guidance=(8.0, 8.0), time="uniform", time_range=(20.0, 980.0)),
    fake_score=FakeScoreConfig(ttur=5, time="uniform", time_range=(0.0, 999.0)),
)


def unet(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return sdxl_pipeline.unet()


def distillation(folder, sharded: bool = False, recomputed: bool = False) -> Distillation:
    """Generator, fake score and head on the random SDXL pipeline, as the engine builds them."""
    adapter = SDXL.load_adapter(settings_of(folder, length=None), CPU, built)
    generator, fake_score, head = unet(0), unet(1), ClassifierHead(16, 1, 4, seed=2)
    for network in (generator, fake_score):
        if recomputed:
            network.enable_gradient_checkpointing()
    if sharded:
        mesh = start_ranks().mesh
        for network in (generator, fake_score):
            shard(network, blocks_of(network), mesh)
        shard(head, [], mesh)
    add_encoder_pass(fake_score)
    discriminator = BottleneckDiscriminator(adapter, Trained.build(head, 1e-3, OPTIMIZER))
    return Distillation(
        config=CONFIG,
        adapter=adapter,
        anchors=SDXL.anchors(settings_of(folder, length=None), (999.0, 749.0, 499.0, 249.0)),
        teacher=unet(3).requires_grad_(False),
        generator=Trained.build(generator, 1e-3, OPTIMIZER),
        fake_score=Trained.build(fake_score, 1e-3, OPTIMIZER),
        discriminator=discriminator,
        device=CPU,
    )


def random_batch(d: Distillation, seed: int, prompts: list[str]) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(len(prompts), *d.adapter.latent_shape(), generator=generator)
    return Batch(prompts, list(range(len(prompts))), latents=latents)


def sample_of(d: Distillation, batch: Batch) -> Sample:
    """A generated sample, with the generator's graph."""
    draws, cond = Draws(0, 5, tuple(batch.indices)), d.adapter.encode_prompts(batch.prompts)
    tau = times(749.0, len(batch.prompts))
    x_tau = draws.normal("eps", d.adapter.latent_shape())
    return Sample(batch, draws, cond, tau, x_tau, denoise(d, d.generator.network, x_tau, tau, cond))


def own_batch(d: Distillation) -> Batch:
    return random_batch(d, 1, ["a red seven", "two blue ones"])


def parts(d: Distillation) -> dict[str, nn.Module]:
    return {
        "generator": d.generator.network,
        "fake_score": d.fake_score.network,
        "head": d.discriminator.heads.network,
        "teacher": d.teacher,
    }


def with_gradients(d: Distillation) -> dict[str, set[str]]:
    """Names of the weights with a gradient, of the networks that have any."""
    names = {
        part: {name for name, p in network.named_parameters() if p.grad is not None}
        for part, network in parts(d).items()
    }
    return {part: found for part, found in names.items() if found}


def weights_of(network: nn.Module) -> set[str]:
    return {name for name, _ in network.named_parameters()}


def logits(d: Distillation, x: Tensor, t: Tensor, eps: Tensor, cond) -> Tensor:
    x_t = add_noise(d.adapter.path, x, eps, t)
    return d.discriminator.heads.network(d.adapter.bottleneck(d.fake_score.network, x_t, t, cond))


def noise(sample: Sample, purpose: str, high: float = 999.0) -> tuple[Tensor, Tensor]:
    """t and eps as the adversary draws them: t uniform over all steps."""
    t = high * sample.draws.uniform(f"{purpose} t")[:, 0]
    return t, sample.draws.normal(f"{purpose} eps", sample.x.shape[1:])


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("sharded", [False, True])
def test_the_classifiers_loss_trains_the_encoder_half_and_the_head_alone(
    sdxl_folder, sharded, recomputed
):
    d = distillation(sdxl_folder, sharded, recomputed)
    sample = sample_of(d, own_batch(d)).detach()
    discriminator_backward(d, sample, 1, True, Measures())
    encoder = {n for n in weights_of(d.fake_score.network) if not n.startswith(UP_HALF)}
    assert with_gradients(d) == {
        "fake_score": encoder,
        "head": weights_of(d.discriminator.heads.network),
    }


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("sharded", [False, True])
def test_the_generators_loss_reaches_only_the_generator(sdxl_folder, sharded, recomputed):
    """Fake score and head are left without gradients and free to learn again."""
    d = distillation(sdxl_folder, sharded, recomputed)
    sample = sample_of(d, own_batch(d))
    modes = {name: network.training for name, network in parts(d).items()}
    loss = d.discriminator.generator_loss(d, sample)
    loss.backward()
    assert with_gradients(d) == {"generator": weights_of(d.generator.network)}
    for network in (d.fake_score.network, d.discriminator.heads.network):
        assert all(p.requires_grad for p in network.parameters())
    assert not any(p.requires_grad for p in d.teacher.parameters())
    assert modes == {name: network.training for name, network in parts(d).items()}

    # the turn's other losses follow on the same weights
    sample = sample.detach()
    fake_score_backward(d, sample, 1, Measures())
    discriminator_backward(d, sample, 1, True, Measures())
    assert with_gradients(d)["fake_score"] == weights_of(d.fake_score.network)


def test_the_gradient_of_the_latent_is_that_of_the_loss_written_out(sdxl_folder):
    d = distillation(sdxl_folder)
    sample = sample_of(d, own_batch(d)).detach()
    grads, losses = [], []
    for written_out in (False, True):
        x = sample.x.clone().requires_grad_()
        copy = replace(sample, denoised=replace(sample.denoised, x_0=x))
        if written_out:
            found = logits(d, x, *noise(sample, "classifier generated"), sample.cond)
            loss = binary_cross_entropy_with_logits(found, torch.ones_like(found))
        else:
            loss = d.discriminator.generator_loss(d, copy)
        grads.append(torch.autograd.grad(loss, x)[0])
        losses.append(loss.detach())
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-8)
    assert grads[0].abs().amax((1, 2, 3)).gt(0).all()


@pytest.mark.parametrize("separate", [False, True])
def test_real_samples_come_with_their_own_prompts(sdxl_folder, separate):
    """L_D written out: generated latents with the batch's prompts, real ones with their own."""
    d = distillation(sdxl_folder)
    batch = own_batch(d)
    if separate:
        batch = replace(batch, other=random_batch(d, 2, ["nine", "a green four"]))
    sample = sample_of(d, batch).detach()
    measures = Measures()
    (loss,) = d.discriminator.losses(d, sample, True, measures)
    real = batch.other if separate else batch
    real_cond = d.adapter.encode_prompts(real.prompts)
    fake_logits = logits(d, sample.x, *noise(sample, "classifier fake"), sample.cond)
    real_logits = logits(d, real.latents, *noise(sample, "classifier real"), real_cond)
    expected = binary_cross_entropy_with_logits(
        fake_logits, torch.zeros_like(fake_logits)
    ) + binary_cross_entropy_with_logits(real_logits, torch.ones_like(real_logits))
    torch.testing.assert_close(loss, expected)
    margin = measures.sums["discriminator/margin"]
    torch.testing.assert_close(margin, (real_logits.mean() - fake_logits.mean()).detach())
    if separate:  # the prompts matter to the logits, so the check above can fail
        other = logits(d, real.latents, *noise(sample, "classifier real"), sample.cond)
        assert not torch.allclose(other, real_logits, atol=1e-4)


def test_real_images_are_encoded_and_real_latents_are_not(sdxl_folder):
    d = distillation(sdxl_folder)
    batch = own_batch(d)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(4)) * 2 - 1
    pictures = Batch(batch.prompts, batch.indices, images=images)
    sample = sample_of(d, pictures).detach()
    eps = sample.draws.normal("posterior real", d.adapter.latent_shape())
    latents = d.adapter.draw_latents(d.adapter.encode_images(images), eps)
    stored = replace(sample, batch=replace(pictures, images=None, latents=latents))
    (one,), (other,) = (d.discriminator.losses(d, s, True, Measures()) for s in (sample, stored))
    torch.testing.assert_close(one, other)


def test_each_use_of_the_noise_is_a_draw_of_its_own(sdxl_folder):
    d = distillation(sdxl_folder)
    sample = sample_of(d, own_batch(d)).detach()
    seen = []
    bottleneck = d.adapter.bottleneck

    def spy(network, x_t, t, cond):
        seen.append((x_t.detach(), t))
        return bottleneck(network, x_t, t, cond)

    object.__setattr__(d.adapter, "bottleneck", spy)
    list(d.discriminator.losses(d, sample, True, Measures()))
    d.discriminator.generator_loss(d, sample)
    t = torch.cat([t for _, t in seen])
    assert len(seen) == 2 and len(t) == 6  # real and generated of L_D in one forward
    assert len(set(t.tolist())) == 6 and t.min() >= 0 and t.max() <= 999


def test_the_adversary_plays_at_every_anchor(sdxl_folder):
    d = distillation(sdxl_folder)
    assert all(d.discriminator.plays(d, tau) for tau in d.anchors.times)
    assert not d.discriminator.sees_images
    sample = sample_of(d, own_batch(d))
    assert d.discriminator.view(d, None, sample, Measures()) is sample
