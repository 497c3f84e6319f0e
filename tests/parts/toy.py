"""A teacher family of a few parameters, for tests of the iteration itself."""

from dataclasses import dataclass

import torch
from torch import nn

from senseflow.common.files import ROOT
from senseflow.config.config import Config
from senseflow.config.sections import (
    AdversarialConfig,
    AnchorsConfig,
    BackwardSimulationConfig,
    DataConfig,
    DmdConfig,
    FakeScoreConfig,
    IdaConfig,
    IsgConfig,
    OptimizerConfig,
    PathsConfig,
    RewardConfig,
    TrainConfig,
)
from senseflow.core.anchors import Anchors
from senseflow.core.path import FlowPath, over_sample
from senseflow.data.sampler import Batch
from senseflow.distill.adversaries import VFMDiscriminator
from senseflow.distill.state import Distillation
from senseflow.distill.vfm_features import FrozenBackbone
from senseflow.distill.vfm_heads import Heads
from senseflow.optim.trained import Trained
from senseflow.teachers.encoded import Conditioning, Posterior

DINOV2 = ROOT / "assets/tiny/common/dinov2"
ANCHORS = (1000.0, 904.5, 759.5, 512.8)


def toy_config(**sections) -> Config:
    """All parts switched on; override a section with `dmd=dict(weight=0.)` and the like."""
    settings = {
        "paths": dict(pretrained_model="none", dataset="none"),
        "train": dict(iter_num=10, batch_size=4, resolution=(16, 16), save_interval=10),
        "optimizer": dict(lr=1e-2, fake_score_lr=1e-2, discriminator_lr=1e-2),
        "anchors": dict(times=ANCHORS),
        "dmd": dict(weight=1.0, guidance=(1.0, 8.0), time="logit_normal"),
        "fake_score": dict(ttur=2, time="logit_normal"),
        "ida": dict(lam=0.9),
        "isg": dict(weight=1.0, guidance=(1.0, 8.0), margin=20.0),
        "adversarial": dict(kind="vfm", weight=2.0, taps=(0, 1)),
        "backward_simulation": dict(probability=0.5),
        "data": dict(max_sequence_length=8),
        "reward": dict(),
    }
    kinds = dict(
        paths=PathsConfig,
        train=TrainConfig,
        optimizer=OptimizerConfig,
        anchors=AnchorsConfig,
        dmd=DmdConfig,
        fake_score=FakeScoreConfig,
        ida=IdaConfig,
        isg=IsgConfig,
        adversarial=AdversarialConfig,
        backward_simulation=BackwardSimulationConfig,
        data=DataConfig,
        reward=RewardConfig,
    )
    return Config(
        recipe="flux_senseflow",
        **{k: kind(**{**settings[k], **sections.get(k, {})}) for k, kind in kinds.items()},
    )


class ToyNetwork(nn.Module):
    """v from x_t, the time, the prompt and (the teacher alone) guidance; counts its calls."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.mix = nn.Conv2d(4, 8, 3, padding=1)
        self.out = nn.Conv2d(8, 4, 3, padding=1)
        self.time = nn.Linear(3, 8)
        self.register_buffer("offset", torch.zeros(1))
        self.calls: list[bool] = []  # whether with gradient

    def forward(self, x_t, t, pooled, guidance):
        self.calls.append(torch.is_grad_enabled())
        facts = torch.stack([t / 1000, pooled[:, 0], guidance / 10], 1)
        hidden = torch.tanh(self.mix(x_t) + self.time(facts)[:, :, None, None])
        return self.out(hidden) + self.offset


@dataclass
class ToyAdapter:
    """Latents (4, 4, 4); images are 16 x 16."""

    path: FlowPath
    shape: tuple[int, int, int] = (4, 4, 4)
    encoded: int = 0
    decoded: int = 0

    def latent_shape(self):
        return self.shape

    def encode_prompts(self, prompts):
        pooled = torch.tensor([[len(p) / 10] for p in prompts])
        return Conditioning(pooled[:, None], pooled)

    def encode_images(self, images):
        self.encoded += 1
        small = nn.functional.avg_pool2d(images, 4)
        mean = torch.cat([small, small.mean(1, keepdim=True)], 1)
        return Posterior(mean, torch.full_like(mean, 0.01))

    def draw_latents(self, posterior, eps):
        return posterior.mean + posterior.std * eps

    def decode(self, latents):
        self.decoded += 1
        return nn.functional.interpolate(latents[:, :3], scale_factor=4.0)

    def predict(self, network, x_t, t, cond):
        return network(x_t, t, cond.pooled, torch.zeros_like(t))

    def predict_guided(self, teacher, x_t, t, cond, scale):
        return teacher(x_t, t, cond.pooled, scale)


class ToyPromptEncoder(nn.Module):
    dim = 3

    def forward(self, prompts):
        return nn.functional.normalize(torch.tensor([[1.0, len(p), 2.0] for p in prompts]), dim=1)


def trained(network: nn.Module, config: Config, lr: float = 1e-2) -> Trained:
    return Trained.build(network, lr, config.optimizer)


def toy_distillation(config: Config) -> Distillation:
    """Teacher, generator and fake score start alike; the embedded DINOv2 judges, on 4 x 4 maps."""
    discriminator = None
    if config.adversarial.in_use == "vfm":
        backbone = FrozenBackbone(f"local-dir:{DINOV2}", config.adversarial.taps)
        heads = Heads(3, backbone.width, 3, config.adversarial.reference != "none").eval()
        discriminator = VFMDiscriminator(backbone, ToyPromptEncoder(), trained(heads, config))
    adapter = ToyAdapter(FlowPath())
    return Distillation(
        config=config,
        adapter=adapter,
        anchors=Anchors(config.anchors.times, end=adapter.path.clean),
        teacher=ToyNetwork(0).requires_grad_(False),
        generator=trained(ToyNetwork(0), config),
        fake_score=trained(ToyNetwork(0), config),
        discriminator=discriminator,
        device=torch.device("cpu"),
    )


def toy_batch(num: int = 4, first: int = 0) -> Batch:
    """Samples first .. first + num - 1 of a global batch; the same sample is always the same."""
    images = [torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(i)) for i in range(20)]
    prompts = [f"prompt {'x' * i}" for i in range(20)]
    chosen = range(first, first + num)
    return Batch(
        images=torch.stack([images[i] * 2 - 1 for i in chosen]),
        prompts=[prompts[i] for i in chosen],
        indices=list(chosen),
    )


class GaussianNetwork(nn.Module):
    """v of a flow teacher whose data are N(mean, root root^T), exactly; latents (B, 2, 1, 1)."""

    def __init__(self, mean, root) -> None:
        super().__init__()
        self.mean, self.root = nn.Parameter(mean.clone()), nn.Parameter(root.clone())

    def forward(self, x_t, t, pooled, guidance):
        sigma = (t / 1000).view(-1, 1, 1)
        alpha = 1 - sigma
        x = x_t.flatten(1)[:, :, None]  # (B, 2, 1)
        covariance = self.root @ self.root.T
        noised = alpha**2 * covariance + sigma**2 * torch.eye(2)  # (B, 2, 2)
        mean = self.mean[:, None]
        x_0 = mean + alpha * covariance @ torch.linalg.solve(noised, x - alpha * mean)
        return ((x - x_0) / sigma).view_as(x_t)


class AffineGenerator(nn.Module):
    """x_0 = m + L x_t in one step from pure noise: N(m, L L^T) exactly."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.root = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.eye(2))

    def forward(self, x_t, t, pooled, guidance):
        x_0 = self.mean + x_t.flatten(1) @ self.root.T
        return (x_t - x_0.view_as(x_t)) / over_sample(t / 1000, x_t)
