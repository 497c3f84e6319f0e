"""Rollouts and L_GRPO in the iteration: against the sampler, REINFORCE and torch.distributions."""

import math
import sys
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from ranks import on_ranks
from sharded import values
from test_algorithm import calls, changed, snapshot
from torch.distributions import Normal
from toy import ANCHORS, toy_batch, toy_config, toy_distillation

from senseflow.common.ranks import Ranks, start_ranks
from senseflow.core.path import VPPath, add_noise
from senseflow.distill.algorithm import draw_turn, generate, generator_backward, train_iteration
from senseflow.distill.measures import Measures
from senseflow.distill.rewards import RewardError, Rewards, Scorer
from senseflow.distill.rollout import diversity, roll_out
from senseflow.distill.state import Distillation, Turn
from senseflow.engine.parallel import shard
from senseflow.engine.rewards import takes_fields
from senseflow.optim.trained import Trained

HERE = Ranks(0, 1, torch.device("cpu"), None)
ALONE = dict(dmd=dict(weight=0.0), isg=dict(weight=0.0), adversarial=dict(kind="none"),
             ida=dict(lam=None))  # fmt: skip
VP = VPPath(torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0))


def brightness(images, prompts):
    """Differentiable, and another for every image."""
    return images.mean((1, 2, 3))


def redness(images, prompts):
    return (images[:, 0] - images[:, 1]).mean((1, 2)) + torch.tensor([len(p) / 99 for p in prompts])


def constant(images, prompts):
    return torch.full((len(images),), 0.3)


def as_bright_as_asked(images, prompts, fields):
    wanted = torch.tensor([row["wanted"] for row in fields])
    return -(images.mean((1, 2, 3)) - wanted).abs()


def with_rewards(config, *functions, ranks=HERE) -> Distillation:
    pairs = zip(functions, config.reward.shares, strict=True)
    scorers = [Scorer(f.__name__, weight, f, True, takes_fields(f)) for f, weight in pairs]
    return replace(toy_distillation(config), rewards=Rewards(scorers, ranks))


def rewarded(*functions, reward=None, **sections) -> Distillation:
    """Theta's turn is every iteration; two groups of two."""
    functions = functions or (brightness,)
    names = [f.__name__ for f in functions]
    reward = dict(weight=1.0, group_size=2, models=tuple(names)) | (reward or {})
    sections = dict(fake_score=dict(ttur=1)) | sections
    return with_rewards(toy_config(reward=reward, **sections), *functions)


def grouped(num: int = 4, first: int = 0):
    """As the sampler gives them: both of a group are its first."""
    whole = toy_batch(4)
    chosen = [i - i % 2 for i in range(first, first + num)]
    prompts = [whole.prompts[i] for i in chosen]
    indices = list(range(first, first + num))
    return replace(whole, prompts=prompts, indices=indices, images=whole.images[chosen])


def turn_at(d: Distillation, anchor: int, *, start: int = 1) -> Turn:
    return next(t for i in range(start, 500) if (t := draw_turn(d, i)).anchor == anchor)


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("path", [None, VP], ids=["flow", "vp"])
def test_a_rollout_is_the_sampler(eta, path):
    """Down all anchors with x_s = alpha_s x_0 + sigma_s (cos eps + sin n), by hand."""
    d = rewarded(reward=dict(eta=eta), anchors=dict(times=(999.0, 749.0, 499.0, 249.0)))
    if path:
        d = replace(d, adapter=replace(d.adapter, path=path))
    turn = draw_turn(d, 3)
    (rollout,) = roll_out(d, turn, [grouped()], Measures())
    draws, x = generate(d, turn, grouped(), rollout).draws, rollout.states[0]
    torch.testing.assert_close(x, draws.normal("rollout 0", (4, 4, 4)))
    for place, t in enumerate(d.anchors.times):
        alpha, sigma = (a.view(4, 1, 1, 1) for a in d.adapter.path.alpha_sigma(torch.full((4,), t)))
        output = d.adapter.predict(
            d.generator.network, x, torch.full((4,), t), d.adapter.encode_prompts(grouped().prompts)
        )
        x_0 = (x - sigma * output) / alpha if path else x - sigma * output
        eps = output if path else x + (1 - sigma) * output
        if place == 3:
            break
        noise = draws.normal(f"rollout {place + 1}", (4, 4, 4))
        alpha, sigma = (
            a.view(4, 1, 1, 1)
            for a in d.adapter.path.alpha_sigma(torch.full((4,), d.anchors.times[place + 1]))
        )
        angle = eta * math.pi / 2
        x = alpha * x_0 + sigma * (math.cos(angle) * eps + math.sin(angle) * noise)
        torch.testing.assert_close(rollout.states[place + 1], x, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(rollout.x_0, x_0, atol=1e-4, rtol=1e-3)


def test_the_rest_of_a_turn_is_on_the_rollouts_states():
    d = rewarded()
    for anchor in range(4):
        turn = turn_at(d, anchor)
        (rollout,) = roll_out(d, turn, [grouped()], Measures())
        sample = generate(d, turn, grouped(), rollout)
        assert torch.equal(sample.x_tau, rollout.states[anchor]) and turn.simulate
        assert sample.x.requires_grad
    assert "rollout" in train_iteration(d, [grouped()], 1, Measures())


@pytest.mark.parametrize("num", [1, 2, 3])
def test_every_step_with_noise_trains_as_often(num):
    d = rewarded(reward=dict(transitions=num))
    turns = [draw_turn(d, i) for i in range(1, 1201)]
    assert {len(t.transitions) for t in turns} == {num}
    assert all(t.anchor in t.transitions for t in turns if t.anchor < 3)
    counts = [sum(step in t.transitions for t in turns) for step in range(3)]
    assert sum(counts) == 1200 * num and min(counts) > 0.85 * 400 * num
    every_second = rewarded(fake_score=dict(ttur=2))
    assert [bool(draw_turn(every_second, i).transitions) for i in (1, 2, 3, 4)] == [0, 1, 0, 1]


def test_a_group_with_shared_noise_differs_by_the_step_that_trains_alone():
    d = rewarded(reward=dict(shared_noise=True))
    turn = turn_at(d, 1)
    assert turn.transitions == (1,)
    (rollout,) = roll_out(d, turn, [grouped()], Measures())
    for place, state in enumerate(rollout.states):
        (a, b), (c, e) = state[:2], state[2:]
        assert torch.allclose(a, b) == torch.allclose(c, e) == (place < 2), place
        assert not torch.allclose(a, c)
    free = rewarded()
    (rollout,) = roll_out(free, turn_at(free, 1), [grouped()], Measures())
    assert not torch.allclose(*rollout.states[0][:2])


def by_distributions(d: Distillation, turn: Turn, rollout, advantages) -> torch.Tensor:
    """REINFORCE's loss: -A log p of the steps that train, by torch.distributions."""
    total, path, eta = 0.0, d.adapter.path, d.config.reward.eta * math.pi / 2
    for step in turn.transitions:
        t, s = (torch.full((4,), d.anchors.times[k]) for k in (step, step + 1))
        x, cond = rollout.states[step], d.adapter.encode_prompts(grouped().prompts)
        denoised = path.read(d.adapter.predict(d.generator.network, x, t, cond), x, t)
        alpha, sigma = (a.view(4, 1, 1, 1) for a in path.alpha_sigma(s))
        mean = alpha * denoised.x_0 + sigma * math.cos(eta) * denoised.eps
        law = Normal(mean, (sigma * math.sin(eta)).expand_as(mean))
        log_prob = law.log_prob(rollout.states[step + 1]).flatten(1).mean(1)
        total = total - (advantages * log_prob).mean() / len(turn.transitions)
    return total


@pytest.mark.parametrize("anchor", [1, 3])
@pytest.mark.parametrize("num", [1, 3])
def test_the_gradient_is_reinforces(anchor, num):
    d = rewarded(brightness, redness, reward=dict(transitions=num, eta=0.7, weights=(2.0, 0.5),
                                                  weight=3.0), **ALONE)  # fmt: skip
    turn = turn_at(d, anchor)
    (rollout,) = roll_out(d, turn, [grouped()], Measures())
    scores = d.rewards.score(d.adapter.decode(rollout.x_0), grouped().prompts).view(2, 2, 2)
    # Of two, (r - mean) / std is +-1 / sqrt 2.
    signs = (scores[..., 0] - scores[..., 1]).sign() / 2**0.5
    advantages = torch.stack([signs, -signs], -1).mul(torch.tensor([2.0, 0.5])[:, None, None])
    advantages = advantages.sum(0).flatten()
    torch.testing.assert_close(rollout.advantages, advantages, atol=1e-4, rtol=1e-4)
    parameters = list(d.generator.network.parameters())
    loss = 3 * by_distributions(d, turn, rollout, advantages)
    expected = torch.autograd.grad(loss, parameters)
    sample = generate(d, turn, grouped(), rollout)
    generator_backward(d, turn, sample, rollout, 1, Measures())
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-5, rtol=1e-3)
    assert sum(float(g.abs().sum()) for g in expected) > 1e-2


def read(d: Distillation, measures: Measures) -> dict[str, float]:
    return measures.read(HERE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_ratio_is_one_and_the_clip_acts_in_the_second_update(dtype):
    """With a network that computes in bfloat16 too, whatever it rounds to."""
    reward = dict(updates_per_rollout=2, clip=1e-6)
    d = rewarded(reward=reward, **ALONE, optimizer=dict(lr=1e-2))
    predict = type(d.adapter).predict

    def rounded(network, x_t, t, cond):
        return predict(d.adapter, network, x_t, t, cond).to(dtype)

    d.adapter.predict = rounded
    turn = turn_at(d, 0)
    (rollout,) = roll_out(d, turn, [grouped()], Measures())
    for update, expected in ((0, 0.0), (1, 1.0)):
        turn, measures = replace(turn, update=update), Measures()
        sample = generate(d, turn, grouped(), rollout)
        generator_backward(d, turn, sample, rollout, 1, measures)
        assert read(d, measures)["grpo/clipped"] == expected
        d.generator.step()
    ratio = (rollout.log_probs[0] - rollout.old_log_probs[0]).exp()
    assert (ratio != 1).all()


def test_two_updates_move_theta_twice_and_other_networks_once():
    once, twice = (rewarded(reward=dict(updates_per_rollout=u)) for u in (1, 2))
    measures = Measures()
    train_iteration(once, [grouped()], 5, Measures())
    train_iteration(twice, [grouped()], 5, measures)
    steps = [int(next(iter(t.optimizer.state.values()))["step"])
             for t in (twice.generator, twice.fake_score)]  # fmt: skip
    assert steps == [2, 1]
    assert [name for _, name, _ in measures.norms].count("generator") == 2
    assert changed(snapshot(once), snapshot(twice)) >= {"generator", "fake_score"}


@pytest.mark.parametrize("num", [1, 2])
@pytest.mark.parametrize("anchor", [1, 3])
def test_the_least_forwards(anchor, num):
    """K of the rollout, the trained one, and one more for every other step that trains."""
    d = rewarded(reward=dict(transitions=num))
    turn = turn_at(d, anchor)
    train_iteration(d, [grouped()], turn.iteration, Measures())
    others = num - (anchor < 3)
    assert calls(d.generator.network) == [4 + 1, 1 + others]  # 1: ISG
    assert calls(d.teacher) == [2, 0] and calls(d.fake_score.network) == [1, 1]
    assert d.adapter.encoded == 0 and d.adapter.decoded == 2  # the rollout's end and the heads'


@pytest.mark.parametrize("anchor", [0, 2, 3])
def test_micro_batches_of_half_groups_give_the_same_step(anchor):
    # eps 1 makes Adam's step proportional to the gradient, so that rounding is not magnified
    reward = dict(transitions=2, updates_per_rollout=2, last_weight=1.0, clip=0.1)
    sections = dict(optimizer=dict(eps=1.0), adversarial=dict(kind="none"))
    whole, parts = (rewarded(reward=reward, **sections) for _ in range(2))
    iteration = turn_at(whole, anchor).iteration
    train_iteration(whole, [grouped()], iteration, one := Measures())
    train_iteration(parts, [grouped(1, i) for i in range(4)], iteration, four := Measures())
    for name in ("generator", "fake_score"):
        one_step, four_parts = (values({name: getattr(d, name)}) for d in (whole, parts))
        for key in one_step:
            torch.testing.assert_close(
                one_step[key], four_parts[key], atol=2e-5, rtol=1e-3, msg=key
            )
    rows = read(whole, one), read(parts, four)
    assert rows[0].keys() == rows[1].keys()
    names = ("reward/brightness", "reward_spread/brightness", "grpo/advantage", "loss/grpo")
    for name in (*names, "grpo/diversity"):
        assert rows[0][name] == pytest.approx(rows[1][name], abs=1e-5)


def split(rank: int, file: str, world_size: int) -> None:
    """The generator's weights and the row after two iterations, groups spanning ranks."""
    ranks = start_ranks()
    reward = dict(weight=1.0, group_size=4, models=("brightness",), updates_per_rollout=2)
    config = toy_config(
        reward=reward,
        fake_score=dict(ttur=1),
        adversarial=dict(kind="none"),
        optimizer=dict(lr=1e-2, fake_score_lr=1e-2, discriminator_lr=1e-2, eps=1.0),
    )
    d = with_rewards(config, brightness, ranks=ranks)
    for trained in (d.generator, d.fake_score):
        shard(trained.network, [], ranks.mesh)
    d = replace(d, **{n: Trained.build(getattr(d, n).network, 1e-2, config.optimizer)
                      for n in ("generator", "fake_score")})  # fmt: skip
    size, measures = 4 // world_size, Measures()
    same = replace(toy_batch(4), prompts=["a prompt"] * 4)
    mine = slice(rank * size, (rank + 1) * size)
    batch = replace(same, prompts=same.prompts[mine], indices=same.indices[mine],
                    images=same.images[mine])  # fmt: skip
    for iteration in (1, 2):
        train_iteration(d, [batch], iteration, measures)
    row = measures.read(ranks)
    found = values({"generator": d.generator, "fake_score": d.fake_score})
    found |= {name: torch.tensor(value) for name, value in row.items()}
    if rank == 0:
        torch.save(found, file)


def test_ranks_do_not_change_an_update_of_one_group(tmp_path):
    files = [str(tmp_path / f"{n}.pt") for n in (1, 2, 4)]
    for file, world_size in zip(files, (1, 2, 4), strict=True):
        on_ranks(world_size, split, file, world_size)
    one, *others = (torch.load(file) for file in files)
    for other in others:
        assert one.keys() == other.keys() and float(one["grpo/advantage"]) > 0.1
        for name in one:
            torch.testing.assert_close(one[name], other[name], atol=1e-5, rtol=1e-3, msg=name)


def test_how_far_apart_the_images_of_one_prompt_are():
    """By numpy: of the images that were decoded, of every two with one prompt."""
    d, group = rewarded(reward=dict(group_size=4)), replace(grouped(), prompts=["a prompt"] * 4)
    (rollout,) = roll_out(d, draw_turn(d, 1), [group], measures := Measures())
    images = ((d.adapter.decode(rollout.x_0).clamp(-1, 1) + 1) / 2).numpy()
    pairs = list(combinations(images, 2))
    expected = sum(((a - b) ** 2).mean() ** 0.5 for a, b in pairs) / len(pairs)
    assert images.std(0).max() > 0.01 and len(pairs) == 6
    assert read(d, measures)["grpo/diversity"] == pytest.approx(expected, rel=1e-4)


def test_diversity_is_0_for_one_picture_and_1_for_black_and_white():
    noise = torch.rand(1, 1, 99).expand(1, 30, 99)
    assert diversity(noise) == 0
    black_and_white = torch.stack([torch.zeros(2, 5), torch.ones(2, 5)], 1)
    assert diversity(black_and_white) == 1
    assert diversity(torch.cat([black_and_white, torch.zeros(2, 2, 5)])) == 0.5  # mean of prompts


def test_groups_of_equal_rewards_teach_nothing_and_are_counted():
    d = rewarded(constant, **ALONE)
    before = {name: value.clone() for name, value in d.generator.network.state_dict().items()}
    train_iteration(d, [grouped()], 1, measures := Measures())
    after = d.generator.network.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    row = read(d, measures)
    assert row["grpo/equal_groups"] == 2 and row["grad_norm/generator"] == 0
    assert row["reward/constant"] == pytest.approx(0.3) and row["reward_spread/constant"] == 0


def test_a_reward_of_weight_0_is_measured_alone():
    one = rewarded(brightness, **ALONE)
    both = rewarded(brightness, redness, reward=dict(weights=(1.0, 0.0)), **ALONE)
    for d in (one, both):
        train_iteration(d, [grouped()], 1, measures := Measures())
    assert "reward/redness" in read(both, measures)
    first, second = (d.generator.network.state_dict() for d in (one, both))
    assert all(torch.equal(first[name], second[name]) for name in first)


# ---------------------------------------------------------------------- the last step's gradient


def test_the_rewards_own_gradient_is_at_the_anchors_that_are_named():
    """At the anchors that are named; where it would be the only loss, a turn elsewhere is none."""
    for named, anchors in ((None, {3}), ((759.5,), {2}), ((1000.0, 512.8), {0, 3})):
        d = rewarded(reward=dict(weight=0.0, last_weight=1.0, anchors=named), **ALONE)
        turns = [draw_turn(d, i) for i in range(1, 60)]
        assert {t.anchor for t in turns if t.generator} == anchors
        train_iteration(d, [grouped()], turn_at(d, min(anchors)).iteration, measures := Measures())
        assert "loss/reward" in read(d, measures)


def test_the_rewards_own_gradient_is_where_each_number_of_steps_ends():
    for named, ends in ((None, {(2, 759.5), (4, 512.8)}), ((759.5,), {(2, 759.5), (4, 759.5)})):
        reward = dict(weight=0.0, last_weight=1.0, anchors=named)
        d = rewarded(reward=reward, anchors=dict(times=ANCHORS, steps=(2, 4)), **ALONE)
        turns = [draw_turn(d, i) for i in range(1, 99)]
        assert {(len(t.anchors), t.tau) for t in turns if t.generator} == ends


def test_a_rollout_is_as_long_as_its_turns_sampling():
    d = rewarded(anchors=dict(times=ANCHORS, steps=(2, 4)), reward=dict(transitions=1))
    turn = next(t for i in range(1, 99) if len((t := draw_turn(d, i)).anchors) == 2)
    (rollout,) = roll_out(d, turn, [grouped()], Measures())
    assert turn.transitions == (0,) and len(rollout.states) == 2
    t, s = (torch.full((4,), d.anchors.times[place]) for place in (0, 2))
    x_T, cond = rollout.states[0], rollout.cond
    above = d.adapter.path.read(d.adapter.predict(d.generator.network, x_T, t, cond), x_T, t)
    noise = generate(d, turn, grouped(), rollout).draws.normal("rollout 1", (4, 4, 4))
    expected = add_noise(d.adapter.path, above.x_0, noise, s)
    torch.testing.assert_close(rollout.states[1], expected)
    before = {k: v.clone() for k, v in d.generator.network.state_dict().items()}
    train_iteration(d, [grouped()], turn.iteration, measures := Measures())
    assert "loss/grpo" in read(d, measures)
    assert any(not torch.equal(v, before[k]) for k, v in d.generator.network.state_dict().items())


@pytest.mark.parametrize("adversary", ["vfm", "none"])
def test_the_last_step_follows_the_rewards_own_gradient(adversary):
    sections = ALONE | (dict(adversarial=dict(weight=1e-9)) if adversary == "vfm" else {})
    reward = dict(weight=0.0, last_weight=2.0, weights=(1.0, 3.0))
    d = rewarded(brightness, redness, reward=reward, **sections)
    turns = [draw_turn(d, i) for i in range(1, 60)]
    assert not any(t.transitions for t in turns)
    if adversary == "none":  # it is the only loss, and at no other anchor
        assert {t.anchor for t in turns if t.generator} == {3}
    turn = turn_at(d, 3)
    sample = generate(d, turn, grouped())
    network = d.generator.network
    images = d.adapter.decode(sample.x)
    pictures = (images.clamp(-1, 1) + 1) / 2
    loss = -2 * (brightness(pictures, []) + 3 * redness(pictures, grouped().prompts)).mean()
    expected = torch.autograd.grad(loss, list(network.parameters()), retain_graph=True)
    d.adapter.decoded = 0
    if adversary == "vfm":
        sample = d.discriminator.view(d, turn, sample, Measures())
    generator_backward(d, turn, sample, None, 1, measures := Measures())
    assert d.adapter.decoded == 1
    assert read(d, measures)["loss/reward"] == pytest.approx(loss.item() / 2)
    for parameter, gradient in zip(network.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-5, rtol=1e-3)


# ------------------------------------------------------------------------------- prompts alone


@pytest.mark.parametrize("size", [1, 4])
def test_a_reward_reads_the_rows_of_its_own_prompts(size):
    d = rewarded(as_bright_as_asked, brightness, reward=dict(weight=1.0, last_weight=1.0), **ALONE)
    rows, turn = [{"wanted": w} for w in (0.1, 0.1, 0.9, 0.9)], turn_at(d, 3)
    parts = [
        replace(grouped(size, i), images=None, fields=rows[i : i + size]) for i in range(0, 4, size)
    ]
    rollouts = roll_out(d, turn, parts, measures := Measures())
    images = (d.adapter.decode(torch.cat([r.x_0 for r in rollouts])).clamp(-1, 1) + 1) / 2
    scores = -(images.mean((1, 2, 3)) - torch.tensor([0.1, 0.1, 0.9, 0.9])).abs()
    found = read(d, measures)
    assert found["reward/as_bright_as_asked"] == pytest.approx(scores.mean().item(), abs=1e-5)
    assert found["reward/brightness"] == pytest.approx(images.mean().item(), abs=1e-5)
    train_iteration(d, parts, turn.iteration, measures)
    expected = -(scores + images.mean((1, 2, 3))).mean()
    assert read(d, measures)["loss/reward"] == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_without_an_adversary_and_data_at_the_anchors_nothing_looks_at_images(weight):
    """DMD, IDA, ISG, L_GRPO and the reward's own gradient: the same to the bit without them."""
    sections = dict(adversarial=dict(kind="none"), backward_simulation=dict(probability=1.0))
    reward = dict(weight=weight, last_weight=1.0)
    seen, unseen = (rewarded(reward=reward, fake_score=dict(ttur=2), **sections) for _ in "ab")
    for iteration in range(1, 17):
        train_iteration(seen, [grouped()], iteration, Measures())
        train_iteration(unseen, [replace(grouped(), images=None)], iteration, Measures())
    for name in ("generator", "fake_score"):
        one, two = (getattr(d, name).network.state_dict() for d in (seen, unseen))
        assert all(torch.equal(one[key], two[key]) for key in one)
    assert {draw_turn(seen, i).anchor for i in range(1, 17)} == {0, 1, 2, 3}


# ------------------------------------------------------------------------------- rewards that fail


def nan_for_one(images, prompts):
    scores = images.mean((1, 2, 3))
    scores[0] = torch.nan
    return scores


def too_few(images, prompts):
    return images.mean((1, 2, 3))[:1]


def a_list(images, prompts):
    return [0.0] * len(images)


def raising(images, prompts):
    raise KeyError("no such colour")


def leaving(images, prompts):
    sys.exit("done")


FAILING = [
    (leaving, "reward leaving raised SystemExit('done') (test_rollout.py, line "),
    (nan_for_one, "reward nan_for_one is not finite for 1 of 4 images"),
    (too_few, "reward too_few returned [1] for 4 images, not a tensor of as many scores"),
    (a_list, "reward a_list returned list for 4 images"),
    (
        raising,
        "reward raising raised KeyError('no such colour') "
        f"(test_rollout.py, line {raising.__code__.co_firstlineno + 1})",
    ),
]


@pytest.mark.parametrize(("function", "said"), FAILING)
def test_a_reward_that_fails_is_named_and_nothing_has_moved(function, said):
    for reward in (dict(), dict(weight=0.0, last_weight=1.0)):
        d = rewarded(function, reward=reward, optimizer=dict(lr=1.0))
        before, turn = snapshot(d), turn_at(d, 3)
        with pytest.raises(RewardError) as error:
            train_iteration(d, [grouped()], turn.iteration, Measures())
        assert str(error.value).startswith(said)
        assert changed(before, snapshot(d)) == set()


def careless(images, prompts, fields):
    images.zero_()
    prompts.reverse()
    for row in fields:
        row.clear()
    return images.new_zeros(len(images))


def test_what_a_reward_changes_in_place_is_its_own():
    """Not the next reward's, nor the iteration's."""
    images = torch.rand(2, 3, 4, 4).requires_grad_()
    prompts, fields, seen = ["a", "b"], [{"count": 1}, {"count": [2]}], []

    def kept(pictures, words, fields):
        seen.append((pictures.detach(), words, fields))
        return pictures.mean((1, 2, 3))

    scorers = [Scorer(f.__name__, 1.0, f, True, takes_fields=True) for f in (careless, kept)]
    with torch.no_grad():
        Rewards(scorers, start_ranks()).score(images, prompts, fields)
    ((pictures, words, rows),) = seen
    torch.testing.assert_close(pictures, (images.detach() + 1) / 2)
    assert words == prompts == ["a", "b"] and rows == fields == [{"count": 1}, {"count": [2]}]


def no_gradient(images, prompts):
    return images.detach().mean((1, 2, 3))


def test_a_reward_that_is_not_differentiable_after_all_is_named():
    d = rewarded(no_gradient, reward=dict(weight=0.0, last_weight=1.0))
    said = "no_gradient says that it is differentiable, and its scores carry no gradient"
    with pytest.raises(RewardError, match=said):
        train_iteration(d, [grouped()], turn_at(d, 3).iteration, Measures())


def fails_on_rank_1(rank: int) -> None:
    ranks = start_ranks()

    def picky(images, prompts):
        if rank == 1:
            raise RuntimeError("out of ideas")
        return brightness(images, prompts)

    reward = dict(weight=1.0, group_size=2, models=("picky",))
    config = toy_config(reward=reward, fake_score=dict(ttur=1), adversarial=dict(kind="none"))
    d = with_rewards(config, picky, ranks=ranks)
    said = r"reward picky raised RuntimeError\('out of ideas'\)"
    with pytest.raises(RewardError, match=said):
        train_iteration(d, [grouped(2, 2 * rank)], 1, Measures())


def test_all_ranks_end_alike_where_one_rewards_function_raises():
    on_ranks(2, fails_on_rank_1)
