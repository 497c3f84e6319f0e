"""ISG on SDXL's path: its value for a teacher whose flow is known, and that it truly guides.

The second half is a test of the released recipe's collapse too: forms of ISG that reuse a
prediction on the second leg must fail the assertion that the real one passes.
"""

from types import SimpleNamespace

import pytest
import sdxl_pipeline
import torch
from teacher_parts import CPU, PROMPTS, built, settings_of
from torch import Tensor, nn

from senseflow.config.sections import IsgConfig
from senseflow.core.anchors import Anchors
from senseflow.core.draws import Draws
from senseflow.core.isg import isg_loss
from senseflow.core.path import VPPath, add_noise, ode_step, over_sample
from senseflow.data.sampler import Batch
from senseflow.distill import algorithm as distill
from senseflow.distill.state import (
    Distillation,
    Sample,
    Turn,
    denoise,
    denoise_guided,
    draw_scale,
    on_device,
    times,
)
from senseflow.teachers.sdxl.family import SDXL

TIMES = (999.0, 749.0, 499.0, 249.0)
ANCHORS = Anchors(TIMES, end=VPPath.clean)
MARGIN = 20.0


def turn_at(anchor: int) -> Turn:
    return Turn(5, ANCHORS, anchor, simulate=False, generator=True, adversarial=False)


def distillation(folder, adapter, teacher: nn.Module, student: nn.Module, guidance: float):
    return Distillation(
        config=SimpleNamespace(
            isg=IsgConfig(weight=1.0, guidance=(guidance, guidance), margin=MARGIN, loss="l2")
        ),
        adapter=adapter,
        anchors=ANCHORS,
        teacher=teacher,
        generator=SimpleNamespace(network=student),
        fake_score=None,
        discriminator=None,
        device=CPU,
    )


def sample_at(d: Distillation, anchor: int, x_tau: Tensor, cond, iteration: int = 5) -> Sample:
    """The student's input at an anchor and its prediction; `iteration` is for the draws alone."""
    draws, tau = Draws(0, iteration, (0, 1)), times(TIMES[anchor], 2)
    denoised = denoise(d, d.generator.network, x_tau, tau, cond)
    return Sample(Batch(PROMPTS, [0, 1]), draws, cond, tau, x_tau, denoised)


# ------------------------------------------------------------------- a teacher of known flow


class GaussianFlow:
    """Data N(mean, std^2) in each place, on SDXL's path, in float64: x_t ~ N(alpha mean, s_t^2)."""

    def __init__(self, path, mean: float, std: float) -> None:
        self.path, self.mean, self.std = path, mean, std

    def moments(self, t: Tensor, like: Tensor):
        alpha, sigma = (over_sample(a.double(), like) for a in self.path.alpha_sigma(t))
        return alpha, sigma, (alpha**2 * self.std**2 + sigma**2).sqrt()

    def eps(self, x_t: Tensor, t: Tensor) -> Tensor:
        """E[eps | x_t]."""
        alpha, sigma, spread = self.moments(t, x_t)
        return sigma / spread**2 * (x_t.double() - alpha * self.mean)

    def moved(self, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """The exact probability flow from t to s: the standardised place is kept."""
        alpha, _, spread = self.moments(t, x_t)
        alpha_s, _, spread_s = self.moments(s, x_t)
        return alpha_s * self.mean + spread_s / spread * (x_t.double() - alpha * self.mean)


class ExactStudent:
    """The prediction whose one step down to the segment's end is the exact flow."""

    def __init__(self, flow: GaussianFlow, low: float) -> None:
        self.flow, self.low = flow, low

    def eps(self, x_t: Tensor, t: Tensor) -> Tensor:
        low = torch.full_like(t, self.low)
        alpha, sigma, _ = self.flow.moments(t, x_t)
        alpha_low, sigma_low, _ = self.flow.moments(low, x_t)
        ratio = alpha_low / alpha
        ends_at = self.flow.moved(x_t, t, low)
        return (ends_at - ratio * x_t.double()) / (sigma_low - ratio * sigma)


class ExactAdapter:
    """Networks are those closed forms; no guidance."""

    def __init__(self, path) -> None:
        self.path = path

    def predict(self, network, x_t, t, cond):
        return network.eps(x_t, t)

    def predict_guided(self, teacher, x_t, t, cond, scale):
        return teacher.eps(x_t, t)


def closed_form(flow: GaussianFlow, x_tau: Tensor, tau: float, mid: Tensor, low: float) -> Tensor:
    """ISG of an exact student: the error of the teacher's one step to t_mid, carried to the end."""
    tau, low = torch.full((2,), tau), torch.full((2,), low)
    alpha, sigma, _ = flow.moments(tau, x_tau)
    alpha_mid, sigma_mid, spread_mid = flow.moments(mid, x_tau)
    _, _, spread_low = flow.moments(low, x_tau)
    eps = flow.eps(x_tau, tau)
    x_mid = alpha_mid * (x_tau.double() - sigma * eps) / alpha + sigma_mid * eps
    error = x_mid - flow.moved(x_tau, tau, mid)
    return (spread_low / spread_mid * error).square().mean()


def exact_distillation(folder, anchor: int, std: float):
    path = SDXL.path(settings_of(folder, length=None))
    flow = GaussianFlow(path, mean=0.7, std=std)
    low = (*TIMES, path.clean)[anchor + 1]
    student = ExactStudent(flow, low)
    return distillation(folder, ExactAdapter(path), flow, student, guidance=1.0), flow, low


def exact_input(d: Distillation, anchor: int, std: float) -> Tensor:
    """A sample of the data at an anchor."""
    eps = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(anchor))
    return add_noise(d.adapter.path, 0.7 + std * eps[0], eps[1], times(TIMES[anchor], 2))


@pytest.mark.parametrize("anchor", range(4))
def test_an_exact_student_is_left_with_the_teachers_step_error(sdxl_folder, anchor):
    d, flow, low = exact_distillation(sdxl_folder, anchor, std=0.5)
    x_tau = exact_input(d, anchor, 0.5)
    sample = sample_at(d, anchor, x_tau, None)
    u = sample.draws.uniform("isg t_mid")[:, 0]
    mid = low + MARGIN + u * (TIMES[anchor] - low - 2 * MARGIN)
    expected = closed_form(flow, x_tau, TIMES[anchor], mid, low)
    found = distill.isg(d, turn_at(anchor), sample, {}).double()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-9)
    for collapsed in (teachers_eps_on_the_second_leg, one_eps_on_both_branches):
        other = collapsed(d, turn_at(anchor), sample, {}).double()
        assert not torch.allclose(other, expected, rtol=0.1), collapsed.__name__


@pytest.mark.parametrize("anchor", range(4))
def test_it_is_zero_where_the_teachers_steps_are_exact(sdxl_folder, anchor):
    """Data of one point: every step along the path is exact, whatever the mid-point."""
    d, _, _ = exact_distillation(sdxl_folder, anchor, std=0.0)
    x_tau = exact_input(d, anchor, 0.0)
    for iteration in range(5, 9):
        sample = sample_at(d, anchor, x_tau, None, iteration)
        assert distill.isg(d, turn_at(anchor), sample, {}).item() < 1e-9


# ------------------------------------------------------------------------- on the real adapter


class Nudged(nn.Module):
    """A student whose prediction is moved everywhere but at one anchor."""

    def __init__(self, network: nn.Module, anchor: int) -> None:
        super().__init__()
        self.network, self.anchor, self.nudge = network, anchor, 0.0

    def forward(self, sample, timestep, *args, **kwargs):
        (output,) = self.network(sample, timestep, *args, **kwargs)
        away = over_sample((timestep != TIMES[self.anchor]).float(), output)
        return (output + self.nudge * away,)


def unet(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return sdxl_pipeline.unet()


def assert_guided_within_the_segment(isg, folder, anchor: int) -> None:
    """The loss depends on the mid-point, and on the student's own prediction there."""
    settings = settings_of(folder, length=None)
    adapter, student = SDXL.load_adapter(settings, CPU, built), Nudged(unet(1), anchor)
    d = distillation(folder, adapter, unet(0).requires_grad_(False), student, guidance=5.0)
    x_tau = torch.randn(2, *adapter.latent_shape(), generator=torch.Generator().manual_seed(2))
    cond, losses = adapter.encode_prompts(PROMPTS), {}
    for name, nudge, iteration in (("", 0.0, 5), ("mid-point", 0.0, 6), ("student", 0.5, 5)):
        student.nudge = nudge
        sample = sample_at(d, anchor, x_tau, cond, iteration)
        losses[name] = isg(d, turn_at(anchor), sample, {})
    for name in ("mid-point", "student"):
        change = abs(losses[name].item() / losses[""].item() - 1)
        assert change > 1e-3, f"the loss does not depend on the {name}"
    losses[""].backward()
    assert all(p.grad is not None for p in student.parameters())
    assert all(p.grad is None for p in d.teacher.parameters())


@pytest.mark.parametrize("anchor", range(4))
def test_isg_guides_within_the_segment(sdxl_folder, anchor):
    assert_guided_within_the_segment(distill.isg, sdxl_folder, anchor)


def mid_point(d, turn, sample):
    """t_mid, the segment's end, and the teacher's prediction at the anchor, as ISG draws them."""
    u = on_device(d, sample.draws.uniform("isg t_mid")[:, 0])
    t_mid = d.anchors.midpoint(turn.anchor, d.config.isg.margin, u)
    low = times(d.anchors.segment(turn.anchor)[0], len(sample.tau))
    scale = draw_scale(d, sample, "isg", d.config.isg.guidance)
    return t_mid, low, denoise_guided(d, sample.x_tau, sample.tau, sample.cond, scale)


def teachers_eps_on_the_second_leg(d, turn, sample, pictures):
    """Collapse: the target is the teacher's own one step over the whole segment."""
    path = d.adapter.path
    with torch.no_grad():
        t_mid, low, teacher = mid_point(d, turn, sample)
        x_mid = ode_step(path, teacher, t_mid)
        target = ode_step(path, path.read(teacher.eps, x_mid, t_mid), low)
    return isg_loss(ode_step(path, sample.denoised, low), target, "l2")


def one_eps_on_both_branches(d, turn, sample, pictures):
    """Collapse: both ways go on from the mid-point with one and the same prediction."""
    path = d.adapter.path
    with torch.no_grad():
        t_mid, low, teacher = mid_point(d, turn, sample)
        x_mid = ode_step(path, teacher, t_mid)
        eps = denoise(d, d.generator.network, x_mid, t_mid, sample.cond).eps
        target = ode_step(path, path.read(eps, x_mid, t_mid), low)
    own_mid = ode_step(path, sample.denoised, t_mid)
    direct = ode_step(path, path.read(eps, own_mid, t_mid), low)
    return isg_loss(direct, target, "l2")


@pytest.mark.parametrize("collapsed", [teachers_eps_on_the_second_leg, one_eps_on_both_branches])
@pytest.mark.parametrize("anchor", range(4))
def test_collapsed_forms_of_isg_are_told_apart(sdxl_folder, monkeypatch, collapsed, anchor):
    monkeypatch.setattr(distill, "isg", collapsed)
    with pytest.raises(AssertionError, match="does not depend on the"):
        assert_guided_within_the_segment(distill.isg, sdxl_folder, anchor)
