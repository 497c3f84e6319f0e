"""Algorithm 1: one training iteration of SenseFlow.

    x_tau   the student's input at the drawn anchor: its own sample, or a real latent, noised
    x       the student's prediction of x_0 at x_tau
    theta   generator, every N-th iteration:  L_DMD + lambda_adv L_adv + lambda_isg L_ISG, then IDA;
            with rewards + L_GRPO on steps of a rollout, of which x_tau is then a state
    heads   discriminator, every iteration:   L_D on sg(x) and a real image
    phi     fake score, every iteration:      L_fake on sg(x)

`train_iteration` is the algorithm; below it stands one function per line of it. The equations are
in `senseflow.core`, everything that differs between teachers behind `senseflow.teachers.adapter`,
the adversaries (SenseFlow's, DMD2's) in `senseflow.distill.adversaries`, rollouts in
`senseflow.distill.rollout`.
Random draws are functions of seed, iteration and purpose (shared by all ranks: which anchor,
simulate or not), and of the sample's index in the global batch for all else; so which networks are
called never depends on a rank, and results do not depend on how the batch is split (but for
shuffled references and virtual batches, which look at the other samples of a micro-batch).
"""

from dataclasses import replace
from itertools import zip_longest

import torch
from torch import Tensor

from senseflow.core.anchors import Anchors
from senseflow.core.dmd import dmd_gradient, dmd_loss, fake_score_loss
from senseflow.core.draws import Draws, seed_of
from senseflow.core.isg import isg_loss
from senseflow.core.path import Denoised, add_noise, ode_step
from senseflow.data.sampler import Batch
from senseflow.distill.measures import Measures, phase
from senseflow.distill.rollout import (
    Rollout,
    draw_transitions,
    policy_loss,
    resample,
    roll_out,
)
from senseflow.distill.state import (
    Distillation,
    Sample,
    Turn,
    batch_on_device,
    clean_latents,
    conditioning,
    denoise,
    denoise_guided,
    draw_scale,
    draw_times,
    on_device,
    reflects,
    times,
)
from senseflow.optim.trained import Trained, align_networks
from senseflow.teachers.encoded import Conditioning


def train_iteration(
    d: Distillation, batches: list[Batch], iteration: int, measures: Measures
) -> dict[str, Tensor]:
    """One iteration over the micro-batches of this rank's share of the global batch.

    Adds detached losses and gradient norms to `measures` and returns the latents it computed for
    the first micro-batch, by name, for the image strip.

    A step whose gradient norm is not finite is skipped: it changes neither the network nor its
    optimizer's state (`Trained.step`), and theta's takes EMA and IDA with it. The norm is of the
    network's own gradient alone, so a network whose loss is fine takes its step in an iteration in
    which another one skips its own: theta without phi, phi without the heads. With DMD2's
    classifier the heads' loss is a loss of phi as well, and phi skips with them. What moves in a
    forward, the vectors of the heads' spectral norms, follows from weights alone and goes on.
    Decided on the device, alike on all ranks; the host learns of it when it reads `measures`.
    """
    if d.foresight and iteration < d.config.train.iter_num:
        # The samples of every iteration have the same places in its global batch.
        turn = draw_turn(d, iteration + 1)
        d.foresight.prepare(turn.kind, iteration, [draws_of(d, turn, b) for b in batches])
    return take_turn(d, draw_turn(d, iteration), batches, measures)


def take_turn(
    d: Distillation, turn: Turn, batches: list[Batch], measures: Measures
) -> dict[str, Tensor]:
    """The iteration of a given turn."""
    rollouts = roll_out(d, turn, batches, measures) if turn.transitions else []
    for number in range(d.config.reward.updates_per_rollout if rollouts else 1):
        turn, samples = replace(turn, update=number), []
        for batch, rollout in zip_longest(batches, rollouts):
            sample = generate(d, turn, batch, rollout)
            if turn.adversarial and d.discriminator:
                sample = d.discriminator.view(d, turn, sample, measures)
            if turn.generator:
                sample = generator_backward(d, turn, sample, rollout, len(batches), measures)
            # sg(x) as it was before theta moves: phi and the heads learn from this x, not a new
            # one.
            samples.append(sample.detach())

        if turn.generator:
            taken = update(d, turn, d.generator, "generator", measures)
            if d.ema:
                d.ema.update(taken)
            align(d, turn, taken)  # before phi's own step, which then starts from where theta is

    # Every iteration, not on theta's turn alone: phi has N steps to follow each of theta's (TTUR).
    # The heads first, up to their step: their gradients are gone before phi's are there.
    if turn.adversarial and d.discriminator:
        for i, sample in enumerate(samples):
            discriminator_backward(d, sample, len(batches), i == 0, measures)
        # Not where omega is 0: AdamW's momentum moves weights on gradients of zero too.
        update(d, turn, d.discriminator.heads, "discriminator", measures)
    if d.config.dmd.weight > 0:
        for sample in samples:
            fake_score_backward(d, sample, len(batches), measures)
        # After both losses: that of DMD2's classifier has left gradients in phi as well.
        update(d, turn, d.fake_score, "fake_score", measures)
    return samples[0].pictures


# ---------------------------------------------------------------------------------- steps 1 to 3


def draw_turn(d: Distillation, iteration: int) -> Turn:
    """ONE anchor and ONE simulate-or-not for the iteration, equal on all ranks."""
    draws = Draws(d.seed, iteration, ())
    # How often the sharded student is called hangs on the anchor: a rank with another one would
    # wait for gathers that never come.
    anchors = draw_anchors(d, draws)
    anchor = int(torch.randint(len(anchors), (), generator=draws.shared("anchor")))
    # Shared as well: simulating calls the student, a real latent does not.
    u = float(torch.rand((), generator=draws.shared("simulate")))
    adversarial = d.has_adversary(anchors.times[anchor])
    config = d.config
    turn = Turn(
        iteration=iteration,
        anchors=anchors,
        anchor=anchor,
        simulate=u < config.backward_simulation.probability,
        # The first is iteration N: phi has then seen N - 1 batches of what theta makes.
        generator=iteration % config.fake_score.ttur == 0,
        adversarial=adversarial,
    )
    if turn.generator and config.reward.weight > 0:
        # The states of a rollout are simulated, whatever was drawn.
        return replace(turn, simulate=True, transitions=draw_transitions(d, turn, draws))
    # With weights of 0, L_adv may be the only loss, and at the top anchor it is out.
    has_loss = config.dmd.weight + config.isg.weight > 0 or adversarial or reflects(d, turn)
    return replace(turn, generator=turn.generator and has_loss)


def draw_anchors(d: Distillation, draws: Draws) -> Anchors:
    """The anchors of one of the numbers of steps that the student is trained for."""
    walks = d.config.anchors.walks
    drawn = int(torch.randint(len(walks), (), generator=draws.shared("steps")))
    return d.anchors.of_walk(walks[drawn])


def draws_of(d: Distillation, turn: Turn, batch: Batch) -> Draws:
    """The draws of a micro-batch."""
    seed = seed_of(d.seed, turn.update, "update") if turn.update else d.seed
    return Draws(seed, turn.iteration, tuple(batch.indices))


@phase("generate")
def generate(d: Distillation, turn: Turn, batch: Batch, rollout: Rollout | None = None) -> Sample:
    """Steps 1 to 3: encode the prompts, build x_tau, predict x, with grad on theta's turn."""
    draws = draws_of(d, turn, batch)
    if d.foresight:
        draws = d.foresight.draws(turn.kind, draws)
    if rollout:
        batch, cond, x_tau = rollout.batch, rollout.cond, rollout.states[turn.anchor]
        pictures = {"rollout": rollout.x_0}
    else:
        batch = batch_on_device(d, batch)
        cond = conditioning(d, batch)
        x_tau, pictures = student_input(d, turn, batch, draws, cond)
    tau = times(turn.tau, len(batch.prompts), d.device)
    # On other turns x only feeds phi and the heads, which take sg(x).
    with torch.set_grad_enabled(turn.generator):
        denoised = denoise(d, d.generator.network, x_tau, tau, cond)
    pictures = {"generated": denoised.x_0.detach(), **pictures}
    return Sample(batch, draws, cond, tau, x_tau, denoised, pictures)


@torch.no_grad()
def student_input(
    d: Distillation, turn: Turn, batch: Batch, draws: Draws, cond: Conditioning
) -> tuple[Tensor, dict[str, Tensor]]:
    """x_tau = alpha x_clean + sigma eps; pure noise at the top anchor, where x_clean is not built.

    x_clean is the student's own sample (backward simulation) or the real latent.
    """
    shape = d.adapter.latent_shape()
    eps = on_device(d, draws.normal("eps", shape))
    if turn.anchor == 0:  # sampling begins with noise alone, even where alpha is not quite 0
        return eps, {}
    tau = times(turn.tau, len(eps), d.device)
    if turn.simulate:
        # So that the student trains on what it meets in sampling: its own samples, not data.
        above = backward_simulation(d, turn, draws, cond)
        return resample(d, above, eps, tau), {"clean input": above.x_0}
    x_clean = clean_latents(d, batch, draws, "posterior")
    return add_noise(d.adapter.path, x_clean, eps, tau), {"clean input": x_clean}


@torch.no_grad()
def backward_simulation(d: Distillation, turn: Turn, draws: Draws, cond: Conditioning) -> Denoised:
    """The student's x_0 at the anchor above the drawn one, from pure noise, re-noised on the way.

    Each step predicts x_0 and noises it with FRESH noise to the next anchor (DMD2, Section 4.5).
    """
    shape, num = d.adapter.latent_shape(), len(draws.indices)
    noise = [on_device(d, draws.normal(f"simulate {i}", shape)) for i in range(turn.anchor)]
    tau = [times(t, num, d.device) for t in turn.anchors.times[: turn.anchor]]
    denoised = denoise(d, d.generator.network, noise[0], tau[0], cond)
    for eps, t in zip(noise[1:], tau[1:], strict=True):
        # Re-noised as the sampler does it; the ODE would be another way down.
        x_t = resample(d, denoised, eps, t)
        denoised = denoise(d, d.generator.network, x_t, t, cond)
    return denoised


# ---------------------------------------------------------------------- step 4: theta, then IDA


@phase("generator")
def generator_backward(
    d: Distillation,
    turn: Turn,
    sample: Sample,
    rollout: Rollout | None,
    num_micro: int,
    measures: Measures,
) -> Sample:
    """Backpropagate L_G = L_DMD + lambda_adv L_adv + lambda_isg L_ISG of one micro-batch, and of
    its rollout L_GRPO."""
    config, pictures = d.config, dict(sample.pictures)
    losses: dict[str, Tensor] = {}
    total = torch.zeros((), device=d.device)
    if config.dmd.weight > 0:
        losses["loss/dmd"] = dmd(d, sample, pictures)
        total = total + config.dmd.weight * losses["loss/dmd"]
    if turn.adversarial and d.discriminator:
        losses["loss/adv"] = d.discriminator.generator_loss(d, sample)
        total = total + config.adversarial.weight * losses["loss/adv"]
    if config.isg.weight > 0:
        losses["loss/isg"] = isg(d, turn, sample, pictures)
        total = total + config.isg.weight * losses["loss/isg"]
    if reflects(d, turn):
        losses["loss/reward"] = reward_loss(d, sample)
        total = total + config.reward.last_weight * losses["loss/reward"]
    if rollout and turn.anchor in turn.transitions:
        losses["loss/grpo"] = grpo(d, turn, sample, rollout, turn.anchor)
        total = total + config.reward.weight / len(turn.transitions) * losses["loss/grpo"]
    if losses:
        # One backward: these losses share the graph of one forward of the student.
        (total / num_micro).backward()
    measures.add({**losses, "loss/generator": total})
    for step in turn.transitions:
        if rollout and step != turn.anchor:  # each a graph of its own, which its backward frees
            loss = grpo(d, turn, sample, rollout, step)
            (config.reward.weight / len(turn.transitions) * loss / num_micro).backward()
            measures.add({"loss/grpo": loss})
    if rollout:
        measures.add({"grpo/clipped": rollout.clipped(config.reward.clip)})
    return replace(sample, pictures=pictures)


def grpo(d: Distillation, turn: Turn, sample: Sample, rollout: Rollout, step: int) -> Tensor:
    """L_GRPO of the rollout's step from one anchor: of x's own prediction, or of one more."""
    denoised = sample.denoised
    if step != turn.anchor:
        t = times(turn.anchors.times[step], len(sample.tau), d.device)
        denoised = denoise(d, d.generator.network, rollout.states[step], t, sample.cond)
    return policy_loss(d, turn, rollout, step, denoised)


def reward_loss(d: Distillation, sample: Sample) -> Tensor:
    """L_R: -R of x decoded, 0-d, whose gradient is the rewards' own (docs/method.md, 14)."""
    assert d.rewards
    images = d.adapter.decode(sample.x) if sample.images is None else sample.images
    return d.rewards.loss(images, sample.batch.prompts, sample.batch.fields)


def dmd(d: Distillation, sample: Sample, pictures: dict[str, Tensor]) -> Tensor:
    """L_DMD: the teacher's (guided) and the fake score's x_0 at a fresh x_t."""
    config, path = d.config.dmd, d.adapter.path
    with torch.no_grad():
        # No graph through teacher or phi: the gradient at x is the difference of their scores.
        t = draw_times(d, sample, "dmd", config.time, config.time_range)
        eps = on_device(d, sample.draws.normal("dmd eps", sample.x.shape[1:]))
        x_t = add_noise(path, sample.x, eps, t)
        scale = draw_scale(d, sample, "dmd", config.guidance)
        real = denoise_guided(d, x_t, t, sample.cond, scale)
        # Without guidance: phi models what the student makes, and guidance is in that already.
        fake = denoise(d, d.fake_score.network, x_t, t, sample.cond)
        gradient = dmd_gradient(sample.x, fake.x_0, real.x_0, config.floor)
    pictures.update({"teacher x0": real.x_0, "fake x0": fake.x_0})
    return dmd_loss(sample.x, gradient)


def isg(d: Distillation, turn: Turn, sample: Sample, pictures: dict[str, Tensor]) -> Tensor:
    """L_ISG: down the segment in one step, against the teacher's way to a random mid-point."""
    config, path = d.config.isg, d.adapter.path
    low, _ = turn.anchors.segment(turn.anchor)
    tau_low = times(low, len(sample.tau), d.device)
    with torch.no_grad():
        u = on_device(d, sample.draws.uniform("isg t_mid"))[:, 0]
        t_mid = turn.anchors.midpoint(turn.anchor, config.margin, u)
        scale = draw_scale(d, sample, "isg", config.guidance)
        # From the student's own x_tau, so that both ways begin at one point.
        teacher = denoise_guided(d, sample.x_tau, sample.tau, sample.cond, scale)
        x_mid = ode_step(path, teacher, t_mid)
        student = denoise(d, d.generator.network, x_mid, t_mid, sample.cond)
        x_target = ode_step(path, student, tau_low)
    # Step 3's prediction once more: the direct way costs no forward of its own.
    x_direct = ode_step(path, sample.denoised, tau_low)
    pictures.update({"ISG target": x_target, "ISG direct": x_direct.detach()})
    return isg_loss(x_direct, x_target, config.loss)


@phase("generator")
def align(d: Distillation, turn: Turn, taken: Tensor) -> None:
    """IDA (Eq. 9), at once after theta's step, if it was taken."""
    if d.config.ida.lam is not None:
        phi, theta, seed = d.fake_score, d.generator, rounding_seed(d, turn, "ida")
        compiled = d.config.parallel.compiled
        align_networks(phi.network, theta.network, d.config.ida.lam, taken, seed, compiled)


# ------------------------------------------------------------------------------- steps 5 and 6


@phase("fake_score")
def fake_score_backward(
    d: Distillation, sample: Sample, num_micro: int, measures: Measures
) -> None:
    """Backpropagate L_fake on sg(x) of one micro-batch."""
    config, path = d.config.fake_score, d.adapter.path
    t = draw_times(d, sample, "fake", config.time, config.time_range)
    eps = on_device(d, sample.draws.normal("fake eps", sample.x.shape[1:]))
    x_t = add_noise(path, sample.x, eps, t)
    output = d.adapter.predict(d.fake_score.network, x_t, t, sample.cond)
    loss = fake_score_loss(output, sample.x, eps, path)
    (loss / num_micro).backward()
    measures.add({"loss/fake": loss})


@phase("discriminator")
def discriminator_backward(
    d: Distillation, sample: Sample, num_micro: int, first: bool, measures: Measures
) -> None:
    """Backpropagate L_D of one micro-batch into the heads (and, with DMD2's, into phi)."""
    assert d.discriminator
    total = torch.zeros((), device=d.device)
    for loss in d.discriminator.losses(d, sample, first, measures):
        (d.config.adversarial.discriminator_weight * loss / num_micro).backward()
        total = total + loss.detach()
    measures.add({"loss/discriminator": total})


@phase("optimizer")
def update(d: Distillation, turn: Turn, trained: Trained, name: str, measures: Measures) -> Tensor:
    """Clip and step one network; returns whether the step was taken, 0-d float32, 1 or 0."""
    norm = trained.step(rounding_seed(d, turn, name))
    measures.add_step(turn.iteration, name, norm)
    return torch.isfinite(norm).float()


def rounding_seed(d: Distillation, turn: Turn, name: str) -> int:
    """The seed of an update's stochastic rounding, another one for every update."""
    again = f" {turn.update}" if turn.update else ""
    return seed_of(d.seed, turn.iteration, f"rounding {name}{again}")
