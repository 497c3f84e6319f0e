"""The two adversaries: SenseFlow's, on a vision foundation model, and DMD2's, on the fake score.

Both are parts of `senseflow.distill.algorithm`'s iteration through
`senseflow.distill.state.Discriminator`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from senseflow.core.adversarial import (
    hinge_discriminator_loss,
    hinge_generator_loss,
    margin,
    omega,
    softplus_discriminator_loss,
    softplus_generator_loss,
)
from senseflow.core.path import add_noise
from senseflow.data.sampler import Batch
from senseflow.distill.diffaug import NUM_UNIFORMS, diff_augment
from senseflow.distill.measures import Measures, image_drift, phase
from senseflow.distill.state import (
    Distillation,
    Sample,
    Turn,
    Views,
    clean_latents,
    conditioning,
    draw_times,
    frozen,
    on_device,
    real_images,
    reflects,
    times,
)
from senseflow.distill.vfm_features import FrozenBackbone, PromptEncoder
from senseflow.distill.vfm_heads import Heads
from senseflow.optim.trained import Trained
from senseflow.teachers.encoded import Conditioning


@dataclass(frozen=True)
class VFMDiscriminator:
    """D(x, c, r) = h(f_VFM(x), c, r): frozen features and text, heads that learn (Eqs. 13-15)."""

    backbone: FrozenBackbone
    prompt_encoder: PromptEncoder | None  # None: a cache knows its features of all prompts
    heads: Trained
    sees_images: bool = True

    def plays(self, d: Distillation, tau: float) -> bool:
        """Where omega is above the least that counts; by default everywhere but at the top anchor
        of flow teachers, where it is 0."""
        # On the host: which networks are called must not wait for the device.
        return bool(self._omega(d, times(tau, 1)) > d.config.adversarial.least_omega)

    @phase("discriminator")
    def view(self, d: Distillation, turn: Turn, sample: Sample, measures: Measures) -> Sample:
        """Decode x once; the features of it (with grad on theta's turn) and of the reference."""
        # One decoding and one DINOv2 for both turns: the heads' step takes them detached.
        with torch.set_grad_enabled(turn.generator):
            images = d.adapter.decode(sample.x)
            fake = self.backbone(augment(d, sample, images, "augment fake"))
        with torch.no_grad():
            real = real_images(d, sample.batch)
            text = self._text(d, sample.batch)
            reference = self._reference(d, real)
        measures.add(image_drift(images, real))
        views = Views(fake, text, reference, real)
        # Kept for the rewards alone: one decoding for both.
        return replace(sample, views=views, images=images if reflects(d, turn) else None)

    def generator_loss(self, d: Distillation, sample: Sample) -> Tensor:
        """The heads judge x; their weights and buffers take no part.

        One head after the other, each to its gradient at the features: no two of them are gathered,
        or keep what they computed, at once.
        """
        assert sample.views
        heads, weight = cast(Heads, self.heads.network), self._omega(d, sample.tau)
        losses = []
        with frozen(heads):
            for number, features in enumerate(sample.views.fake):
                maps = features.detach().to(heads.dtype).requires_grad_(True)
                loss = hinge_generator_loss(self._judge(number, maps, sample.views), weight)
                loss.backward()  # to maps alone; torch's FLOP counter forbids autograd.grad at them
                losses.append(with_gradient(loss, features, cast(Tensor, maps.grad)))
        return torch.stack(losses).mean()  # all maps are alike: of all places of all heads

    def losses(
        self, d: Distillation, sample: Sample, first: bool, measures: Measures
    ) -> Iterator[Tensor]:
        """The hinge loss of one micro-batch, a head's share at a time.

        Spectral norm's power iteration moves with the first micro-batch only, so that its buffers
        do not depend on how the batch is split.
        """
        assert sample.views
        views, heads = sample.views, cast(Heads, self.heads.network)
        weight, margins = self._omega(d, sample.tau), []
        with torch.no_grad():
            real = self.backbone(augment(d, sample, views.real, "augment real"))
        for number, pair in enumerate(zip(views.fake, real, strict=True)):
            # One pass over fake and real: the reference and the text are worked on once for both.
            with heads.power_iteration(first):
                logits_fake, logits_real = self._judge(number, torch.cat(pair), views).chunk(2)
            margins.append(margin(logits_real, logits_fake))
            yield hinge_discriminator_loss(logits_real, logits_fake, weight) / len(real)
        measures.add({"discriminator/margin": torch.stack(margins).mean()})

    def _judge(self, number: int, maps: Tensor, views: Views) -> Tensor:
        """One head's logits (B, L) of its maps (B, C, h, w)."""
        reference = views.reference and [views.reference[number]]
        logits: Tensor = self.heads.network([maps], views.text, reference, first=number)
        return logits

    def _text(self, d: Distillation, batch: Batch) -> Tensor:
        """CLIP's features of the prompts (B, D): as a cache knows them, or computed now."""
        if batch.encoded.text is not None:
            return batch.encoded.text
        assert self.prompt_encoder is not None
        text: Tensor = self.prompt_encoder(batch.prompts)
        return text.to(d.device)

    def _reference(self, d: Distillation, real: Tensor) -> list[Tensor] | None:
        """Features of each prompt's own real image, of another sample's ("shuffled"), or none."""
        mode = d.config.adversarial.reference
        if mode == "none":
            return None
        # Never augmented: it says what belongs to the prompt, and is not judged. "shuffled" keeps
        # heads from winning by seeing that a real image is its own reference.
        features: list[Tensor] = self.backbone(real.roll(1, 0) if mode == "shuffled" else real)
        return features

    def _omega(self, d: Distillation, tau: Tensor) -> Tensor:
        return omega(d.adapter.path, tau, d.config.adversarial.omega_power)


class BottleneckAdapter(Protocol):
    """An adapter whose networks have a bottleneck to read."""

    def bottleneck(self, network: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """The bottleneck's features (B, C, h, w) at (x_t, t)."""
        ...


@dataclass(frozen=True)
class BottleneckDiscriminator:
    """DMD2's classifier of diffused latents: heads on the bottleneck of the fake score itself."""

    adapter: BottleneckAdapter
    heads: Trained
    sees_images: bool = False

    def plays(self, d: Distillation, tau: float) -> bool:
        """At every anchor: its noise is drawn apart."""
        return True

    def view(self, d: Distillation, turn: Turn, sample: Sample, measures: Measures) -> Sample:
        """Nothing is shared between the turns."""
        return sample

    def generator_loss(self, d: Distillation, sample: Sample) -> Tensor:
        """softplus(-D) of the diffused x; neither fake score nor heads take part.

        The gradient at x is taken here, because activation checkpointing runs the fake score again
        on the way back and must meet it as frozen as the first time.
        """
        x = sample.x.detach().requires_grad_(True)
        with frozen(d.fake_score.network, self.heads.network):
            x_t, t = self._diffuse(d, sample, x, "classifier generated")
            loss = softplus_generator_loss(self._logits(d, x_t, t, sample.cond))
            (gradient,) = torch.autograd.grad(loss, x)
        return with_gradient(loss, sample.x, gradient)

    def losses(
        self, d: Distillation, sample: Sample, first: bool, measures: Measures
    ) -> Iterator[Tensor]:
        """softplus(D(fake)) + softplus(-D(real)) of diffused latents; real ones with their own
        prompts. The gradient reaches the fake score's encoder half and the heads."""
        real, cond = sample.batch.real, sample.cond
        with torch.no_grad():
            latents = clean_latents(d, real, sample.draws, "posterior real")
            if real is not sample.batch:
                cond = conditioning(d, real)
            x_fake, t_fake = self._diffuse(d, sample, sample.x, "classifier fake")
            x_real, t_real = self._diffuse(d, sample, latents, "classifier real")
        # One pass for both: the sharded fake score is gathered once.
        logits = self._logits(
            d, torch.cat([x_fake, x_real]), torch.cat([t_fake, t_real]), sample.cond.cat(cond)
        )
        logits_fake, logits_real = logits.chunk(2)
        measures.add({"discriminator/margin": margin(logits_real, logits_fake)})
        yield softplus_discriminator_loss(logits_real, logits_fake)

    def _diffuse(
        self, d: Distillation, sample: Sample, x: Tensor, purpose: str
    ) -> tuple[Tensor, Tensor]:
        """x noised to a uniform t, and that t."""
        t = draw_times(d, sample, purpose, "uniform", d.config.adversarial.time_range)
        eps = on_device(d, sample.draws.normal(f"{purpose} eps", x.shape[1:]))
        return add_noise(d.adapter.path, x, eps, t), t

    def _logits(self, d: Distillation, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """Logits (B, L) of latents x_t (B, C, h, w) at t (B,)."""
        features = self.adapter.bottleneck(d.fake_score.network, x_t, t, cond)
        logits: Tensor = self.heads.network(features)
        return logits


def with_gradient(loss: Tensor, x: Tensor, gradient: Tensor) -> Tensor:
    """The value of a 0-d loss whose gradient at x, as large as x, has been taken: linear in x, so
    that its backward hands that gradient on, and no graph of what took it is kept."""
    return loss.detach() + (gradient * (x - x.detach())).sum()


def augment(d: Distillation, sample: Sample, images: Tensor, purpose: str) -> Tensor:
    """DiffAugment with this sample's draws; images (B, 3, H, W)."""
    if not d.config.adversarial.augment:
        return images
    return diff_augment(images, on_device(d, sample.draws.uniform(purpose, NUM_UNIFORMS)))
