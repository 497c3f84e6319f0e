"""SenseFlow in two dimensions: DMD, IDA and ISG where the teacher is known exactly.

    python examples/toy_2d.py --output runs/toy_2d

The teacher is a mixture of Gaussians on a flow path; student and fake score are small networks that
start as its copies, with FLUX's four anchors and the equations of senseflow.core. The fake score
learns slowly on purpose. There is no prompt, guidance or adversary. What it shows, and what it does
not, stands in examples/README.md.
"""

import argparse
import copy
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toy_2d_report import draw, energy_distance, posterior_mean
from tqdm import tqdm

from senseflow.common.commands import number
from senseflow.common.fields import Count, SmallCount
from senseflow.core.anchors import Anchors, draw_time
from senseflow.core.dmd import dmd_gradient, dmd_loss, fake_score_loss
from senseflow.core.ida import align_
from senseflow.core.isg import isg_loss
from senseflow.core.path import Denoised, FlowPath, add_noise, ode_step

PATH = FlowPath()
ANCHORS = Anchors((1000.0, 904.5, 759.5, 512.8))  # FLUX's
MODES, RADIUS, SPREAD = 8, 2.0, 0.15  # of the teacher's mixture, on a ring


@dataclass(frozen=True)
class Settings:
    iterations: int = 800
    batch: int = 128  # samples per seed
    ttur: int = 2  # N: iterations per generator update
    lr: float = 5e-4
    fake_lr: float = 1e-4  # the fake score lags behind
    margin: float = 20.0  # of t_mid


@dataclass(frozen=True)
class Variant:
    name: str
    lam: float = 1.0  # of IDA; 1: none
    isg: float = 0.0  # weight of L_ISG


VARIANTS = (
    Variant("DMD"),
    Variant("+ IDA", lam=0.9),
    Variant("+ ISG", isg=0.3),
    Variant("+ IDA + ISG", lam=0.9, isg=0.3),
)


class Mixture(nn.Module):
    """The teacher: v(x_t, t) of a mixture of Gaussians, exactly."""

    def __init__(self) -> None:
        super().__init__()
        angle = torch.arange(MODES) * 2 * math.pi / MODES
        self.means = RADIUS * torch.stack([angle.cos(), angle.sin()], 1)  # (K, 2)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (a[:, None] for a in PATH.alpha_sigma(t))
        variance = alpha**2 * SPREAD**2 + sigma**2  # of x_t, in each component
        offset = x_t[:, None] - alpha[..., None] * self.means  # (B, K, 2)
        weights = (-offset.square().sum(2) / (2 * variance)).softmax(1)
        x_0 = self.means + (alpha * SPREAD**2 / variance)[..., None] * offset
        x_0 = (weights[..., None] * x_0).sum(1)  # E[x_0 | x_t]
        return (x_t - x_0) / sigma

    def density(self, x_0: Tensor) -> Tensor:
        offset = x_0[:, None] - self.means
        return (-offset.square().sum(2) / (2 * SPREAD**2)).exp().mean(1)

    def sample(self, num: int) -> Tensor:
        return self.means[torch.randint(MODES, (num,))] + SPREAD * torch.randn(num, 2)


class Networks(nn.Module):
    """A small MLP v(x_t, t) per seed, side by side: samples of all seeds stand in one batch."""

    def __init__(self, seeds: int, width: int = 64) -> None:
        super().__init__()
        self.seeds = seeds
        sizes = [(7, width), (width, width), (width, width), (width, 2)]
        self.weights = nn.ParameterList(torch.randn(seeds, a, b) / a**0.5 for a, b in sizes)
        self.biases = nn.ParameterList(torch.zeros(seeds, 1, b) for _, b in sizes)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        s = t[:, None] / 1000
        waves = [f(k * math.pi * s) for k in (1, 2) for f in (torch.sin, torch.cos)]
        h = torch.cat([x_t, s, *waves], 1).unflatten(0, (self.seeds, -1))
        for i, (w, b) in enumerate(zip(self.weights, self.biases, strict=True)):
            h = torch.baddbmm(b, F.silu(h) if i else h, w)
        return h.flatten(0, 1)


def denoise(network: nn.Module, x_t: Tensor, t: Tensor) -> Denoised:
    return PATH.read(network(x_t, t), x_t, t)


def at(time: float, num: int) -> Tensor:
    return torch.full((num,), time)


def step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def pretrained(teacher: Mixture, seeds: int, iterations: int = 1500, batch: int = 256) -> Networks:
    """Student and fake score start from a network that knows the teacher."""
    network = Networks(seeds)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    for _ in range(iterations):
        x_0, eps = teacher.sample(seeds * batch), torch.randn(seeds * batch, 2)
        t = 1000 * torch.rand(len(x_0)).clamp(0.01)
        x_t = add_noise(PATH, x_0, eps, t)
        step(optimizer, (network(x_t, t) - teacher(x_t, t)).square().mean())
        scheduler.step()
    return network


@torch.no_grad()
def generate(generator: nn.Module, num: int, anchor: int = len(ANCHORS)) -> Tensor:
    """The student's x_0 from noise over the anchors above `anchor`, re-noised between them."""
    x = torch.zeros(num, 2)
    for time in ANCHORS.times[:anchor]:
        t = at(time, num)
        x = denoise(generator, add_noise(PATH, x, torch.randn_like(x), t), t).x_0
    return x


def distil(
    variant: Variant, s: Settings, teacher: Mixture, start: Networks, measure_at: set[int]
) -> list[tuple[int, Networks, Networks]]:
    """Algorithm 1 without the adversary; (iteration, generator, fake score) where asked."""
    theta, phi = copy.deepcopy(start), copy.deepcopy(start)
    theta_optimizer = torch.optim.Adam(theta.parameters(), lr=s.lr)
    phi_optimizer = torch.optim.Adam(phi.parameters(), lr=s.fake_lr)
    num, kept = s.batch * start.seeds, []
    for n in range(1, s.iterations + 1):
        # the student's input at a drawn anchor, from its own samples (backward simulation)
        i = int(torch.randint(len(ANCHORS), ()))
        tau = at(ANCHORS.times[i], num)
        x_tau = add_noise(PATH, generate(theta, num, i), torch.randn(num, 2), tau)
        denoised = denoise(theta, x_tau, tau)
        x = denoised.x_0

        if n % s.ttur == 0:  # theta's turn, then IDA
            loss = distribution_matching(x, teacher, phi)
            if variant.isg:
                loss = loss + variant.isg * guidance(i, x_tau, denoised, teacher, theta, s.margin)
            step(theta_optimizer, loss)
            align_(phi.parameters(), theta.parameters(), variant.lam)

        t, eps = draw_time("uniform", torch.rand(num), 20, 980), torch.randn(num, 2)
        output = phi(add_noise(PATH, x.detach(), eps, t), t)
        step(phi_optimizer, fake_score_loss(output, x, eps, PATH))
        if n in measure_at:
            kept.append((n, copy.deepcopy(theta), copy.deepcopy(phi)))
    return kept


def distribution_matching(x: Tensor, teacher: nn.Module, phi: nn.Module) -> Tensor:
    """L_DMD: towards where the teacher's x_0 differs from the fake score's."""
    with torch.no_grad():
        t = draw_time("uniform", torch.rand(len(x)), 20, 980)
        x_t = add_noise(PATH, x, torch.randn_like(x), t)
        real, fake = denoise(teacher, x_t, t), denoise(phi, x_t, t)
    return dmd_loss(x, dmd_gradient(x.detach(), fake.x_0, real.x_0))


def guidance(
    i: int, x_tau: Tensor, direct: Denoised, teacher: nn.Module, theta: nn.Module, margin: float
) -> Tensor:
    """L_ISG: one step down the segment as by way of the teacher's step to its middle."""
    low, high = (at(time, len(x_tau)) for time in ANCHORS.segment(i))
    with torch.no_grad():
        t_mid = ANCHORS.midpoint(i, margin, torch.rand(len(x_tau)))
        x_mid = ode_step(PATH, denoise(teacher, x_tau, high), t_mid)
        x_target = ode_step(PATH, denoise(theta, x_mid, t_mid), low)
    return isg_loss(ode_step(PATH, direct, low), x_target, "charbonnier")


# ---------------------------------------------------------------------------------- measures


@torch.no_grad()
def fake_score_error(theta: Networks, phi: Networks, num: int = 150, time: float = 600) -> Tensor:
    """E |x_0_fake - E[x_0 | x_t]|^2, (S,), over the student's samples at all anchors, which are
    what the fake score is trained on."""

    def samples() -> Tensor:
        x = [generate(theta, theta.seeds * num, i + 1) for i in range(len(ANCHORS))]
        return torch.cat([part.unflatten(0, (-1, num)) for part in x], 1)  # (S, 4 num, 2)

    x = samples()
    t = at(time, x[..., 0].numel())
    x_t = add_noise(PATH, x.flatten(0, 1), torch.randn(len(t), 2), t)
    fake = denoise(phi, x_t, t).x_0.view_as(x)
    alpha, sigma = (float(a[0]) for a in PATH.alpha_sigma(t))
    true = posterior_mean(x_t.view_as(x), samples(), alpha, sigma)
    return (fake - true).square().sum(2).mean(1)


def run(seeds: int, settings: Settings) -> tuple[dict, Mixture]:
    """All variants from the same start with the same draws: curves, and samples on the way."""
    torch.manual_seed(0)
    teacher = Mixture()
    start, last = pretrained(teacher, seeds), settings.iterations
    exact = teacher.sample(seeds * 500).view(seeds, 500, 2)
    shown = (max(1, last // 4), last)
    every = max(1, last // 40)
    runs = {}
    for variant in tqdm(VARIANTS):
        torch.manual_seed(1)
        curve, snapshots = [], {}
        kept = distil(variant, settings, teacher, start, {*shown, *range(every, last + 1, every)})
        for n, theta, phi in kept:
            x = generate(theta, seeds * 500).view(seeds, 500, 2)
            curve.append((n, energy_distance(x, exact), fake_score_error(theta, phi)))
            if n in shown:
                snapshots[n] = x
        runs[variant.name] = (curve, snapshots)
    return runs, teacher


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/toy_2d"))
    parser.add_argument(
        "--seeds", type=number(SmallCount), default=3, help="networks trained side by side (3)"
    )
    parser.add_argument("--iterations", type=number(Count), default=Settings.iterations)
    args = parser.parse_args()
    runs, teacher = run(args.seeds, Settings(iterations=args.iterations))
    draw(runs, teacher, args.output / "toy_2d.png")
    for name, (curve, _) in runs.items():
        rows = [(n, distance.tolist(), lag.tolist()) for n, distance, lag in curve]
        worst, (_, distance, lag) = max(max(row[1]) for row in rows), rows[-1]
        print(
            f"{name:12} energy distance: worst {worst:.3f}, last "
            f"{' '.join(f'{d:.3f}' for d in distance)}; fake score's error at last "
            f"{' '.join(f'{e:.3f}' for e in lag)}"
        )
    print(args.output / "toy_2d.png")


if __name__ == "__main__":
    main()
