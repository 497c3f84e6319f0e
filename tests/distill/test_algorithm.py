"""The iteration: who learns when, from what, at what cost, and towards which distribution."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from toy import (
    ANCHORS,
    AffineGenerator,
    GaussianNetwork,
    ToyAdapter,
    toy_batch,
    toy_config,
    toy_distillation,
    trained,
)

from senseflow.common.files import ROOT
from senseflow.common.ranks import Ranks
from senseflow.config.config import load_config
from senseflow.config.sections import IdaConfig
from senseflow.core.anchors import Anchors
from senseflow.core.path import FlowPath, VPPath, add_noise
from senseflow.data.sampler import Batch
from senseflow.distill.adversaries import VFMDiscriminator
from senseflow.distill.algorithm import (
    align,
    discriminator_backward,
    draw_turn,
    fake_score_backward,
    generate,
    generator_backward,
    isg,
    train_iteration,
    update,
)
from senseflow.distill.measures import Measures, Step
from senseflow.distill.state import Distillation, Turn
from senseflow.optim.ema import Ema


def snapshot(d: Distillation) -> dict[str, torch.Tensor]:
    """Every parameter, buffer and optimizer state of every network, by name."""
    parts = {"generator": d.generator, "fake_score": d.fake_score, "heads": d.discriminator.heads}
    tensors = {f"teacher/{k}": v for k, v in d.teacher.state_dict().items()}
    tensors |= {f"backbone/{k}": v for k, v in d.discriminator.backbone.state_dict().items()}
    for name, part in parts.items():
        tensors |= {f"{name}/{k}": v for k, v in part.network.state_dict().items()}
        for key, state in part.optimizer.state_dict()["state"].items():
            tensors |= {f"{name}_optimizer/{key}/{k}": v for k, v in state.items()}
    return {k: v.detach().clone() for k, v in tensors.items()}


def changed(before: dict, after: dict) -> set[str]:
    """The networks (first part of the name) of which anything is not bit for bit the same."""
    names = [k for k in after if k not in before or not torch.equal(before[k], after[k])]
    return {name.split("/")[0] for name in names}


def with_gradients(d: Distillation) -> set[str]:
    parts = {"generator": d.generator, "fake_score": d.fake_score, "heads": d.discriminator.heads}
    return {n for n, p in parts.items() if any(q.grad is not None for q in p.network.parameters())}


def turn_of(d: Distillation, *, generator: bool, anchor: int, simulate: bool) -> int:
    """An iteration whose draws are these."""
    for iteration in range(1, 2000):
        turn = draw_turn(d, iteration)
        if (turn.generator, turn.anchor, turn.simulate) == (generator, anchor, simulate):
            return iteration
    raise AssertionError("no such turn")


def warmed_up(**sections) -> Distillation:
    """Past its first updates, so that every optimizer has states and no gradient is zero."""
    d = toy_distillation(toy_config(**sections))
    for iteration in range(1, 5):
        train_iteration(d, [toy_batch()], iteration, Measures())
    return d


def test_each_phase_changes_only_its_own_network():
    d = warmed_up()
    turn = Turn(
        iteration=6, anchors=d.anchors, anchor=2, simulate=True, generator=True, adversarial=True
    )
    start = snapshot(d)

    sample = generate(d, turn, toy_batch())
    sample = d.discriminator.view(d, turn, sample, Measures())
    sample = generator_backward(d, turn, sample, None, 1, Measures())
    assert changed(start, snapshot(d)) == set()  # the heads' spectral norm buffers among them
    assert with_gradients(d) == {"generator"}

    taken = update(d, turn, d.generator, "generator", Measures())
    after_theta = snapshot(d)
    assert changed(start, after_theta) == {"generator", "generator_optimizer"}

    align(d, turn, taken)
    after_ida = snapshot(d)
    assert changed(after_theta, after_ida) == {"fake_score"}

    sample = sample.detach()
    discriminator_backward(d, sample, 1, True, Measures())
    assert with_gradients(d) == {"heads"}
    update(d, turn, d.discriminator.heads, "discriminator", Measures())
    after_heads = snapshot(d)
    assert changed(after_ida, after_heads) == {"heads", "heads_optimizer"}

    fake_score_backward(d, sample, 1, Measures())
    assert changed(after_heads, snapshot(d)) == set() and with_gradients(d) == {"fake_score"}
    update(d, turn, d.fake_score, "fake_score", Measures())
    assert changed(after_heads, snapshot(d)) == {"fake_score", "fake_score_optimizer"}


@pytest.mark.parametrize("anchor", range(4))
@pytest.mark.parametrize("generator", [False, True])
def test_who_moves_on_each_turn(generator, anchor):
    d = warmed_up()
    iteration = turn_of(d, generator=generator, anchor=anchor, simulate=False)
    before = snapshot(d)
    train_iteration(d, [toy_batch()], iteration, Measures())
    expected = {"fake_score", "fake_score_optimizer"}
    if generator:
        expected |= {"generator", "generator_optimizer"}
    if anchor > 0:  # at the top anchor omega is 0: AdamW would move on zero gradients
        expected |= {"heads", "heads_optimizer"}
    assert changed(before, snapshot(d)) == expected
    assert with_gradients(d) == set()


def test_first_generator_turn_is_iteration_n():
    d = toy_distillation(toy_config(fake_score=dict(ttur=5)))
    assert [i for i in range(1, 12) if draw_turn(d, i).generator] == [5, 10]


def test_turns_are_drawn_from_seed_and_iteration_alone():
    d = toy_distillation(toy_config())
    turns = [draw_turn(d, i) for i in range(1, 400)]
    assert turns == [draw_turn(d, i) for i in range(1, 400)]
    counts = [sum(t.anchor == a for t in turns) for a in range(4)]
    assert min(counts) > 70 and 160 < sum(t.simulate for t in turns) < 240
    other = toy_distillation(toy_config(train=dict(seed=1)))
    assert [t.anchor for t in turns] != [draw_turn(other, i).anchor for i in range(1, 400)]


def test_each_number_of_steps_is_drawn_as_often_and_walks_its_own_anchors():
    """[1000, 512.8] of four anchors: the second is reached from noise alone, and ends at none."""
    d = toy_distillation(toy_config(anchors=dict(times=ANCHORS, steps=(2, 4))))
    turns = [draw_turn(d, i) for i in range(1, 400)]
    short = [turn for turn in turns if len(turn.anchors) == 2]
    assert 160 < len(short) < 240 and 80 < sum(turn.anchor for turn in short) < 120
    assert {turn.anchors for turn in turns} == {d.anchors, Anchors(d.anchors.times[::2])}
    assert {turn.kind for turn in short}.isdisjoint({t.kind for t in turns if t not in short})
    turn = next(t for t in short if t.anchor == 1 and t.simulate and t.generator)
    sample = generate(d, turn, toy_batch())
    assert sample.tau.tolist() == [d.anchors.times[2]] * 4 == [turn.tau] * 4
    cond, path, noise = sample.cond, FlowPath(), sample.draws.normal("simulate 0", (4, 4, 4))
    top = torch.full((4,), d.anchors.times[0])
    clean = path.read(d.adapter.predict(d.generator.network, noise, top, cond), noise, top).x_0
    expected = add_noise(path, clean, sample.draws.normal("eps", (4, 4, 4)), sample.tau)
    torch.testing.assert_close(sample.x_tau, expected)
    often = toy_distillation(toy_config(anchors=dict(times=ANCHORS, steps=(2, 2, 4))))
    assert 240 < sum(len(draw_turn(often, i).anchors) == 2 for i in range(1, 400)) < 292
    isg(d, turn, sample, pictures := {})  # where no noise is left both ways are x itself
    torch.testing.assert_close(pictures["ISG direct"], sample.x.detach())


def calls(network: torch.nn.Module) -> list[int]:
    """Forwards of a network without and with gradient since the last reading."""
    result = [network.calls.count(False), network.calls.count(True)]
    network.calls.clear()
    return result


@pytest.mark.parametrize("simulate", [False, True])
@pytest.mark.parametrize("anchor", range(4))
@pytest.mark.parametrize("generator", [False, True])
def test_no_network_is_called_more_than_the_minimum(generator, anchor, simulate):
    """METHOD: a plain turn is k + 1 + trained; a generator turn k + trained + 2 + 2 + trained."""
    d = toy_distillation(toy_config())
    iteration = turn_of(d, generator=generator, anchor=anchor, simulate=simulate)
    train_iteration(d, [toy_batch()], iteration, Measures())
    k = anchor if simulate else 0
    assert calls(d.teacher) == [2 * generator, 0]
    assert calls(d.generator.network) == ([k + 1, 1] if generator else [k + 1, 0])
    assert calls(d.fake_score.network) == [int(generator), 1]
    assert d.adapter.encoded == (0 if simulate or anchor == 0 else 1)
    assert d.adapter.decoded == (0 if anchor == 0 else 1)


@pytest.mark.parametrize("anchor", [0, 3])
def test_accumulation_gives_the_same_step(anchor):
    # eps 1 makes Adam's step proportional to the gradient, so that rounding is not magnified
    whole, halves = (warmed_up(optimizer=dict(eps=1.0)) for _ in range(2))
    iteration = turn_of(whole, generator=True, anchor=anchor, simulate=True)
    train_iteration(whole, [toy_batch(4)], iteration, Measures())
    train_iteration(halves, [toy_batch(2), toy_batch(2, first=2)], iteration, Measures())
    one, two = snapshot(whole), snapshot(halves)
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=2e-5, rtol=1e-3, msg=name)


def test_backward_simulation_walks_down_the_anchors_with_fresh_noise():
    d = toy_distillation(toy_config())
    iteration = turn_of(d, generator=False, anchor=2, simulate=True)
    sample = generate(d, draw_turn(d, iteration), toy_batch())
    cond, path, draws = sample.cond, FlowPath(), sample.draws
    times = [torch.full((4,), t) for t in d.anchors.times]

    def x_0(x_t, t):
        return path.read(d.adapter.predict(d.generator.network, x_t, t, cond), x_t, t).x_0

    noise = [draws.normal(f"simulate {i}", (4, 4, 4)) for i in range(2)]
    assert not torch.equal(*noise)
    clean = x_0(add_noise(path, x_0(noise[0], times[0]), noise[1], times[1]), times[1])
    x_tau = add_noise(path, clean, draws.normal("eps", (4, 4, 4)), times[2])
    torch.testing.assert_close(sample.x_tau, x_tau)
    torch.testing.assert_close(sample.x, x_0(x_tau, times[2]))


def test_a_step_that_is_not_finite_changes_nothing_and_is_named():
    d = warmed_up()
    with torch.no_grad():
        d.teacher.out.bias.fill_(float("nan"))
    iteration = turn_of(d, generator=True, anchor=2, simulate=False)
    before, measures = snapshot(d), Measures()
    train_iteration(d, [toy_batch()], iteration, measures)
    moved = changed(before, snapshot(d)) - {"fake_score", "heads", "teacher"}  # teacher: NaN != NaN
    assert moved == {"fake_score_optimizer", "heads_optimizer"}  # they do not see the teacher
    assert measures.sums["loss/dmd"].isnan() and measures.sums["grad_norm/generator"].isnan()
    assert measures.sums["loss/fake"].isfinite()


@pytest.mark.parametrize("off", [dict(kind="none"), dict(weight=0.0)])
def test_parts_switched_off_are_not_built_and_not_called(off):
    d = toy_distillation(toy_config(adversarial=off, isg=dict(weight=0.0), ida=dict(lam=None)))
    assert d.discriminator is None
    iteration = turn_of(d, generator=True, anchor=2, simulate=False)
    train_iteration(d, [toy_batch()], iteration, Measures())
    assert calls(d.teacher) == [1, 0] and d.adapter.decoded == 0


def as_latents(batch: Batch, d: Distillation) -> Batch:
    """The same samples, encoded beforehand."""
    latents = d.adapter.encode_images(batch.images).mean
    return Batch(batch.prompts, batch.indices, latents=latents)


@pytest.mark.parametrize("simulate", [False, True])
def test_stored_latents_are_not_encoded_and_decoded_once_for_the_heads(simulate):
    d = warmed_up()
    iteration = turn_of(d, generator=True, anchor=2, simulate=simulate)
    batch = as_latents(toy_batch(), d)
    d.adapter.encoded = d.adapter.decoded = 0
    train_iteration(d, [batch], iteration, Measures())
    assert (d.adapter.encoded, d.adapter.decoded) == (0, 2)  # x, and the real image
    sample = generate(d, draw_turn(d, iteration), batch)
    clean = add_noise(
        d.adapter.path, batch.latents, sample.draws.normal("eps", (4, 4, 4)), sample.tau
    )
    assert torch.equal(sample.x_tau, clean) != simulate


def test_distilling_reaches_a_gaussian_teachers_mean_and_covariance():
    """A one-step affine student of an exact Gaussian teacher, through the real iteration."""
    mean, root = torch.tensor([1.0, -0.5]), torch.tensor([[0.8, 0.0], [0.5, 0.6]])
    config = toy_config(
        train=dict(batch_size=64, iter_num=600),
        anchors=dict(times=(1000.0,)),
        dmd=dict(guidance=(1.0, 1.0)),
        fake_score=dict(ttur=3),
        ida=dict(lam=None),
        isg=dict(weight=0.0),
        adversarial=dict(weight=0.0),
    )
    torch.manual_seed(0)
    d = Distillation(
        config=config,
        adapter=ToyAdapter(FlowPath(), shape=(2, 1, 1)),
        anchors=Anchors((1000.0,)),
        teacher=GaussianNetwork(mean, root).requires_grad_(False),
        generator=trained(AffineGenerator(), config, lr=0.02),
        fake_score=trained(GaussianNetwork(torch.zeros(2), torch.eye(2)), config, lr=0.02),
        discriminator=None,
        device=torch.device("cpu"),
    )
    batch = Batch(images=torch.zeros(64, 3, 1, 1), prompts=["a"] * 64, indices=list(range(64)))
    for iteration in range(1, 601):
        decay = min(1.0, 2 - iteration / 300)
        for part in (d.generator, d.fake_score):
            part.set_lr(max(decay, 0.02))
        train_iteration(d, [batch], iteration, Measures())
    student = d.generator.network
    covariance = student.root @ student.root.T
    torch.testing.assert_close(student.mean.detach(), mean, atol=0.05, rtol=0)
    torch.testing.assert_close(covariance.detach(), root @ root.T, atol=0.07, rtol=0)


def test_results_do_not_depend_on_global_random_state():
    first, second = warmed_up(), None
    torch.manual_seed(123)
    second = warmed_up()
    a, b = snapshot(first), snapshot(copy.copy(second))
    assert changed(a, b) == set()


@pytest.mark.parametrize(("least", "playing"), [(0.0, [0, 1, 2, 3]), (0.01, [1, 2, 3])])
def test_the_adversary_plays_where_omega_counts(least, playing):
    """SDXL's schedule: alpha^2 of its anchors is .005, .06, .28, .68."""
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    file = ROOT / "configs" / "sdxl" / "sdxl_senseflow.yaml"
    d = SimpleNamespace(
        config=load_config(file, [f"adversarial.least_omega={least}"]),
        anchors=Anchors((999.0, 749.0, 499.0, 249.0), end=VPPath.clean),
        adapter=SimpleNamespace(path=VPPath((1 - beta).cumprod(0).float())),
    )
    adversary = VFMDiscriminator(None, None, None)
    assert [anchor for anchor in range(4) if adversary.plays(d, d.anchors.times[anchor])] == playing


def poison(network: torch.nn.Module) -> None:
    """Its next backward gives NaN for its first parameter, once."""
    parameter = next(network.parameters())
    handle = parameter.register_hook(lambda gradient: (handle.remove(), gradient * torch.nan)[1])


@pytest.mark.parametrize("name", ["generator", "fake_score", "discriminator"])
def test_a_step_that_is_not_finite_is_skipped_and_the_others_are_taken(name):
    """theta's takes the EMA with it; of skipped heads the vectors of their norms alone go on."""
    d = warmed_up()
    d = replace(d, ema=Ema.start(d.generator.network, 0.5))
    torch._foreach_zero_(list(d.ema.shards.values()))  # apart from the weights, to be seen to move
    d = replace(d, config=replace(d.config, ida=IdaConfig(lam=None)))  # it moves phi too
    heads = d.discriminator.heads
    parts = {"generator": d.generator, "discriminator": heads, "fake_score": d.fake_score}
    poison(parts[name].network)
    before, average = snapshot(d), {k: v.clone() for k, v in d.ema.shards.items()}
    measures = Measures()
    iteration = turn_of(d, generator=True, anchor=2, simulate=True)
    train_iteration(d, [toy_batch()], iteration, measures)
    measures.read(Ranks(0, 1, torch.device("cpu"), None))
    assert measures.steps == [Step(iteration, part, part != name) for part in parts]
    after, own = snapshot(d), {"discriminator": "heads"}.get(name, name)
    kinds = {"generator", "fake_score", "heads"}
    taken = kinds - {own} | {f"{kind}_optimizer" for kind in kinds - {own}}
    assert changed(before, after) == taken | ({"heads"} if own == "heads" else set())
    weights = [f"{own}/{key}" for key, _ in parts[name].network.named_parameters()]
    assert [key for key in weights if not torch.equal(before[key], after[key])] == []
    averaged = any(not torch.equal(v, average[k]) for k, v in d.ema.shards.items())
    assert averaged == (name != "generator")


def test_after_a_skipped_step_of_theta_phi_goes_on_from_where_it_was():
    """IDA is left out with it: phi's step is that of a run without IDA."""
    results = []
    for lam in (0.5, None):
        d = warmed_up()
        d = replace(d, config=replace(d.config, ida=IdaConfig(lam=lam)))
        poison(d.generator.network)
        iteration = turn_of(d, generator=True, anchor=2, simulate=True)
        train_iteration(d, [toy_batch()], iteration, Measures())
        results.append(snapshot(d))
    assert changed(*results) == set()


def test_a_retry_draws_anew_and_none_changes_nothing():
    d = toy_distillation(toy_config())
    assert d.seed == d.config.train.seed
    again = [replace(d, retry=number) for number in (1, 2)]
    drawn = [[draw_turn(one, i) for i in range(1, 40)] for one in (d, *again)]
    assert drawn[0] != drawn[1] != drawn[2] != drawn[0]
    assert drawn[1] == [draw_turn(again[0], i) for i in range(1, 40)]
    turn = replace(drawn[0][4], anchor=2, simulate=False)
    one, other = (generate(x, turn, toy_batch()).x_tau for x in (d, again[0]))
    assert not torch.equal(one, other)
