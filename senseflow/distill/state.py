"""What an iteration works on, and the calls that all of its losses share.

`Distillation` holds the parts of a run, `Turn` what all ranks and micro-batches share in one
iteration, `Sample` one micro-batch on its way through it.
"""

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from senseflow.common.devices import to_device
from senseflow.config.config import Config
from senseflow.core.anchors import Anchors, draw_range, draw_time
from senseflow.core.draws import Draws, seed_of
from senseflow.core.names import TimeLaw
from senseflow.core.path import Denoised
from senseflow.data.sampler import Batch
from senseflow.distill.foresight import Foresight
from senseflow.distill.measures import Measures
from senseflow.distill.rewards import Rewards
from senseflow.optim.ema import Ema
from senseflow.optim.resharding import learns_again, reshard
from senseflow.optim.trained import Trained
from senseflow.teachers.encoded import Conditioning, is_mask

if TYPE_CHECKING:
    from senseflow.teachers.adapter import Adapter


@dataclass(frozen=True)
class Turn:
    """What all ranks and micro-batches share in one iteration."""

    iteration: int
    anchors: Anchors  # of this iteration's walk
    anchor: int  # of them; 0 is the noisiest
    simulate: bool
    generator: bool  # theta's turn
    adversarial: bool  # the discriminator plays at this anchor
    transitions: tuple[int, ...] = ()  # steps of a rollout that train, by the anchor they leave
    update: int = 0  # of theta, on the turn's one rollout

    @property
    def tau(self) -> float:
        """The anchor's time."""
        return self.anchors.times[self.anchor]

    @property
    def kind(self) -> Hashable:
        """What turns have in common that ask for the same draws."""
        return replace(self, iteration=0)


@dataclass(frozen=True)
class Views:
    """What the VFM discriminator's heads see of one micro-batch."""

    fake: list[Tensor]  # features of the decoded x, a (B, C, h, w) per tap
    text: Tensor  # (B, D)
    reference: list[Tensor] | None  # features of real images
    real: Tensor  # images (B, 3, H, W)


@dataclass(frozen=True)
class Sample:
    """One micro-batch on its way through the iteration."""

    batch: Batch
    draws: Draws
    cond: Conditioning
    tau: Tensor  # (B,)
    x_tau: Tensor
    denoised: Denoised  # of G at x_tau; its x_0 is x
    pictures: dict[str, Tensor] = field(default_factory=dict)  # latents, for the image strip
    views: Views | None = None
    images: Tensor | None = None  # x decoded, where rewards and adversary both look at it

    @property
    def x(self) -> Tensor:
        """The student's prediction of x_0, (B, C, h, w)."""
        return self.denoised.x_0

    def detach(self) -> "Sample":
        """This sample without the generator's graph: sg(x), from before theta's step."""
        views = self.views and replace(self.views, fake=[f.detach() for f in self.views.fake])
        denoised = Denoised(self.denoised.x_0.detach(), self.denoised.eps.detach())
        return replace(self, denoised=denoised, views=views, images=None)


class Discriminator(Protocol):
    """The adversary; `senseflow.distill.adversaries` holds the two there are."""

    @property
    def heads(self) -> Trained:
        """The part that learns, with its optimizer; the rest is frozen."""
        ...

    @property
    def sees_images(self) -> bool:
        """Whether it decodes x, so that drift is measured every iteration."""
        ...

    def plays(self, d: "Distillation", tau: float) -> bool:
        """Whether it takes part at this anchor's time; no network is called for it elsewhere."""
        ...

    def view(self, d: "Distillation", turn: Turn, sample: Sample, measures: Measures) -> Sample:
        """What both turns need of x, computed once; with gradient on theta's turn."""
        ...

    def generator_loss(self, d: "Distillation", sample: Sample) -> Tensor:
        """L_adv of x, 0-d; gradients flow to x alone."""
        ...

    def losses(
        self, d: "Distillation", sample: Sample, first: bool, measures: Measures
    ) -> Iterator[Tensor]:
        """L_D of sg(x) and real samples, in terms, 0-d, each to be backpropagated before the next
        is asked for; `first` is the iteration's first micro-batch."""
        ...


@dataclass(frozen=True)
class Distillation:
    """The parts of one distillation."""

    config: Config
    adapter: "Adapter"
    anchors: Anchors
    teacher: nn.Module
    generator: Trained
    fake_score: Trained
    discriminator: Discriminator | None
    device: torch.device
    ema: Ema | None = None  # of the generator
    rewards: Rewards | None = None  # None: there are none
    foresight: Foresight | None = None  # None: all is drawn when it is asked for
    retry: int = 0  # how often the run was stopped by steps that were not finite

    @property
    def seed(self) -> int:
        """Of all that an iteration draws: train.seed, and after each such stop another one, so that
        the same iteration draws anew. The order of the data is of train.seed alone."""
        seed = self.config.train.seed
        return seed_of(seed, self.retry, "retry") if self.retry else seed

    def has_adversary(self, tau: float) -> bool:
        """Whether there is one that plays at an anchor's time."""
        return self.discriminator is not None and self.discriminator.plays(self, tau)


class HasTeacher(Protocol):
    """What the teacher's own predictions need of a `Distillation`; measuring it needs no more."""

    @property
    def adapter(self) -> "Adapter":
        """How the teacher is called."""
        ...

    @property
    def teacher(self) -> nn.Module:
        """The frozen network."""
        ...

    @property
    def device(self) -> torch.device:
        """The device on which the teacher computes."""
        ...


def denoise(
    d: Distillation, network: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning
) -> Denoised:
    """The prediction of the student or the fake score at (x_t, t)."""
    return d.adapter.path.read(d.adapter.predict(network, x_t, t, cond), x_t, t)


def denoise_guided(
    d: HasTeacher, x_t: Tensor, t: Tensor, cond: Conditioning, scale: Tensor
) -> Denoised:
    """The teacher's prediction at (x_t, t) with its guidance."""
    output = d.adapter.predict_guided(d.teacher, x_t, t, cond, scale)
    return d.adapter.path.read(output, x_t, t)


def conditioning(d: HasTeacher, batch: Batch) -> Conditioning:
    """The encoded prompts of a batch: as a cache knows them, or encoded now."""
    if batch.encoded.cond is not None:
        return batch.encoded.cond
    return d.adapter.encode_prompts(batch.prompts)


def clean_latents(d: HasTeacher, batch: Batch, draws: Draws, purpose: str) -> Tensor:
    """The latents of a batch: as stored, or drawn with this purpose's noise from the posterior of
    its images, which a cache knows or the VAE gives now."""
    if batch.latents is not None:
        return batch.latents
    posterior = batch.encoded.posterior
    if posterior is None:
        assert batch.images is not None
        posterior = d.adapter.encode_images(batch.images)
    # Anew each time: one stored draw would be the same latent in every epoch.
    eps = on_device(d, draws.normal(purpose, tuple(posterior.mean.shape[1:])))
    return d.adapter.draw_latents(posterior, eps)


@torch.no_grad()
def real_images(d: Distillation, batch: Batch) -> Tensor:
    """The images (B, 3, H, W) of a batch: as read, or its latents (their mean) decoded."""
    if batch.images is not None:
        return batch.images
    if batch.latents is not None:
        return d.adapter.decode(batch.latents)
    posterior = batch.encoded.posterior
    assert posterior is not None
    mean = d.adapter.draw_latents(posterior, torch.zeros_like(posterior.std))
    return d.adapter.decode(mean)


def first_samples(d: Distillation, batch: Batch, num: int) -> Batch:
    """The first samples of a batch, on the run's device."""
    first = replace(
        batch,
        prompts=batch.prompts[:num],
        indices=batch.indices[:num],
        fields=batch.fields[:num],
        other=None,
    ).map(lambda tensor: tensor[:num])
    return batch_on_device(d, first)


def reflects(d: Distillation, turn: Turn) -> bool:
    """Whether theta is moved by the rewards' own gradient, by the turn's anchor.

    Not again by further updates on one rollout, which are of its steps.
    """
    return d.config.reflects(turn.anchor, len(turn.anchors)) and turn.update == 0


def draw_times(
    d: Distillation, sample: Sample, purpose: str, law: TimeLaw, span: tuple[float, float]
) -> Tensor:
    """One t per sample, (B,)."""
    return draw_time(law, on_device(d, sample.draws.uniform(f"{purpose} t")[:, 0]), *span)


def draw_scale(d: Distillation, sample: Sample, purpose: str, span: tuple[float, float]) -> Tensor:
    """One guidance scale per sample, (B,)."""
    return draw_range(*span, on_device(d, sample.draws.uniform(f"{purpose} guidance")[:, 0]))


def on_device(d: HasTeacher, tensor: Tensor) -> Tensor:
    """A host tensor on the run's device, without waiting for it; a mask of prompts stays."""
    return tensor if is_mask(tensor) else to_device(tensor, d.device)


def batch_on_device(d: HasTeacher, batch: Batch) -> Batch:
    """A batch whose tensors are on the run's device."""
    return batch.map(partial(on_device, d))


def times(t: float, num: int, device: torch.device | None = None) -> Tensor:
    """(num,) copies of one time."""
    # Never bfloat16: its 8 bits would make 904 of 904.5.
    return torch.full((num,), t, dtype=torch.float32, device=device)


@contextmanager
def frozen(*networks: nn.Module) -> Iterator[None]:
    """Neither gradients for the weights nor changes of the buffers; gradients flow through."""
    training = [network for network in networks if network.training]
    for network in networks:  # or L_adv's gradient would stay and join the heads' next step
        reshard(network)  # what is gathered is as the shards were when it was
        network.requires_grad_(False)
    for network in training:  # spectral norm moves its vectors at every forward in train mode
        network.eval()
    try:
        yield
    finally:
        for network in networks:
            reshard(network)
            network.requires_grad_(True)
            learns_again(network)
        for network in training:
            network.train()
