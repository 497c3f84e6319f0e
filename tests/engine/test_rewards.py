"""Which rewards a configuration may name, and what a run does with one that fails."""

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from caches import make
from own_rewards import as_bright_as_asked, brightness, redness
from short_runs import SHORT, begin, configure, finish, write_pictures
from test_skips import config_of
from torch import nn
from toy import toy_batch, toy_config, toy_distillation
from training_runs import full_state, timeless_rows

from senseflow.common.ranks import start_ranks
from senseflow.common.signals import StopRequest
from senseflow.config.config import load_config
from senseflow.config.load import load_recipe
from senseflow.config.recipes import RECIPES
from senseflow.config.sections import IdaConfig, LogConfig
from senseflow.distill.algorithm import draw_turn
from senseflow.distill.rewards import RewardError, Rewards, Scorer
from senseflow.engine.build import check_networks
from senseflow.engine.inputs import read_run
from senseflow.engine.loop import Run
from senseflow.engine.rewards import named_rewards, takes_fields
from senseflow.teachers.flux.adapter import FluxAdapter
from senseflow.weights.card import read_card

FLUX = Path("configs/FLUX/flux_senseflow_tiny.yaml")
RECIPE = Path("configs/FLUX/flux_dancegrpo_tiny.yaml")


def with_reward(*overrides: str):
    return load_config(FLUX, ["reward.weight=1", *overrides])


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([], "reward.weight is above 0 and reward.models is empty: name a reward"),
        (["reward.models=[a:b, a:b]"], "reward.models ['a:b', 'a:b'] names a reward twice"),
        (["reward.models=[a:b]", "reward.weights=[1, 2]"],
         "reward.weights has 2 numbers for 1 of reward.models"),
        (["reward.models=[a:b]", "reward.weights=[0]"], "all reward.weights are 0"),
        (["reward.models=[a:b]", "reward.group_size=1"],
         "reward.group_size 1 must be from 2 to 65536"),
        (["reward.models=[a:b]", "reward.group_size=5"],
         "train.batch_size 48 is not a multiple of reward.group_size 5"),
        (["reward.models=[a:b]", "reward.eta=0"], "reward.eta 0.0 must be above 0 and at most 1"),
        (["reward.models=[a:b]", "reward.clip=0"], "reward.clip 0.0 must be above 0 and below 1"),
        (["reward.models=[a:b]", "anchors.times=[1000, 500]", "reward.anchors=[500, 251]"],
         "reward.anchors [251.0] are none of anchors.times [1000.0, 500.0]"),
        (["reward.models=[a:b]", "reward.transitions=4"],
         "reward.transitions 4: sampling in 4 steps has 3 with noise"),
        (["reward.models=[a:b]", "anchors.steps=[2, 4]", "reward.transitions=2"],
         "reward.transitions 2: sampling in 2 steps has 1 with noise"),
        (["reward.models=[a:b]", "anchors.times=[1000]"], "reward.weight: sampling in one step"),
        (["reward.models=[a:b]", "anchors.steps=[1, 4]"], "reward.weight: sampling in one step"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(overrides, said):
    with pytest.raises(ValueError) as refused:
        with_reward(*overrides)
    assert said in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no_such_module:score", "there is no module no_such_module in the working folder or on"),
        ("own_rewards:blueness", "own_rewards has no function blueness"),
        ("own_rewards:torch", "own_rewards has no function torch"),
        ("broken_reward:score", "ZeroDivisionError('division by zero') (broken_reward.py, line 2)"),
        ("needs_more:score", "needs_more cannot be imported: ModuleNotFoundError"),
        ("script:score", "script cannot be imported: SystemExit(0) (script.py, line 3)"),
        ("beauty", "beauty is neither module:function nor one of clip, hps_v2.1, hps_v2,"),
        ("score:", "score: is neither module:function nor"),
    ],
)
def test_a_users_function_that_is_not_there_is_named(name, said, tmp_path, monkeypatch):
    (tmp_path / "broken_reward.py").write_text("\n1 / 0\n")
    (tmp_path / "needs_more.py").write_text("import no_such_library\n")
    (tmp_path / "script.py").write_text("import sys\n\nsys.exit(0)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError) as refused:
        named_rewards(with_reward(f"reward.models=['{name}']"))
    assert name in str(refused.value) and said in str(refused.value)
    assert "no_such_module" not in sys.modules


def test_a_gradient_that_is_not_there_is_not_asked_for():
    both = "reward.models=[own_rewards:brightness, own_rewards:redness]"
    with pytest.raises(ValueError, match=r"reward\.last_weight 2 asks for the gradient of own"):
        named_rewards(with_reward(both, "reward.last_weight=2"))
    found = named_rewards(with_reward(both, "reward.last_weight=2", "reward.weights=[0, 1]"))
    assert [(n.name, n.differentiable) for n in found] == [
        ("own_rewards:brightness", False),
        ("own_rewards:redness", True),
    ]
    assert [n.open(None) for n in found] == [(brightness, None), (redness, None)]
    assert named_rewards(load_config(FLUX, ["reward.models=[nobody]"])) == []


def test_who_takes_fields_says_so_by_a_parameter_of_that_name():
    assert takes_fields(as_bright_as_asked) and takes_fields(lambda i, p, fields=None: i)
    assert takes_fields(partial(as_bright_as_asked))
    assert not any(map(takes_fields, (brightness, lambda *images, **more: 0, max, nn.Identity())))


# ----------------------------------------------------------------------------------- in a run


def fails_at(asked: int):
    """A reward that is NaN from then on."""
    count = iter(range(1, 1000))
    return lambda images, prompts: (
        images.mean((1, 2, 3)) * (1 if next(count) < asked else torch.nan)
    )


def rewarded_run(folder: Path, asked: int) -> Run:
    folder.mkdir()
    reward = dict(weight=1.0, group_size=2, models=("picky",))
    config = replace(config_of(), reward=toy_config(reward=reward).reward)
    ranks = start_ranks()
    rewards = Rewards([Scorer("picky", 1.0, fails_at(asked), True)], ranks)
    parts = replace(toy_distillation(config), rewards=rewards)
    return Run(config, parts, ranks, lambda start: iter(lambda: [toy_batch()], None), None, folder)


@pytest.mark.parametrize(("asked", "saved"), [(1, 1), (2, 3), (3, 5)])
def test_a_run_whose_reward_fails_is_saved_before_it(asked, saved, tmp_path, monkeypatch):
    """Rollouts are made in iterations 2, 4 and 6; that of the fifth was saved anyway."""
    monkeypatch.setattr(Run, "after_save", lambda *_: None)
    run = rewarded_run(tmp_path / "run", asked)
    said = f"reward picky is not finite for 4 of 4 images, in iteration {saved + 1}; what was train"
    with pytest.raises(RewardError, match=said):
        run.train(0, StopRequest(), show=False)
    steps = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert steps[-1] == f"step_{saved:07d}"
    state = full_state(tmp_path / "run", saved, tmp_path)
    weights = run.parts.generator.network.state_dict()
    assert all(torch.equal(state[f"generator.network.{k}"], v) for k, v in weights.items())


@pytest.mark.parametrize(
    ("weights", "anchors"),
    [(dict(weight=1.0), {0, 1, 2, 3}), (dict(weight=0.0, last_weight=1.0), {3})],
)
def test_rewards_alone_have_strips_of_every_turn_that_learns(
    weights, anchors, tmp_path, monkeypatch
):
    """theta's turns are the even iterations; the rewards' own gradient is of the last anchor."""
    monkeypatch.setattr(Run, "after_save", lambda *_: None)
    run = rewarded_run(tmp_path / "run", 1000)
    off = {name: replace(getattr(run.config, name), weight=0.0) for name in ("dmd", "isg")}
    reward, log = replace(run.config.reward, **weights), LogConfig(sample_interval=1)
    run.config = replace(run.config, **off, ida=IdaConfig(None), reward=reward, log=log)
    run.parts = replace(run.parts, config=run.config)
    run.train(0, StopRequest(), show=False)
    turns = {i: draw_turn(run.parts, i).anchor for i in range(2, 9, 2)}
    expected = [f"step_{i:07d}.png" for i, anchor in turns.items() if anchor in anchors]
    assert expected and sorted(p.name for p in (run.folder / "samples").iterdir()) == expected


RUN = ("reward.weight=1", "reward.last_weight=0.1", "reward.models=[own_rewards:redness]",
       "reward.group_size=2", "reward.updates_per_rollout=2", "reward.transitions=2",
       "reward.shared_noise=true", "reward.eta=0.7", "train.iter_num=4", "train.log_interval=1",
       "train.keep_last=0")  # fmt: skip


ALONE = ("reward.models=[own_rewards:as_bright_as_asked]", "reward.last_weight=0",
         "adversarial.kind=none", "backward_simulation.probability=1",
         "train.grad_accumulation=2", "log.sample_interval=1")  # fmt: skip


def write_prompts(file: Path, num: int = 5) -> Path:
    rows = [{"prompt": f"a red {i} on white", "wanted": i / num} for i in range(num)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.long
def test_the_recipe_on_prompts_alone_goes_on_the_same_to_the_bit(tmp_path, monkeypatch):
    """With strips, without a real image; the second half from a cache of the prompts."""
    data = write_prompts(tmp_path / "p.jsonl")
    monkeypatch.setattr(FluxAdapter, "encode_images", lambda *_: pytest.fail("there are none"))
    both = "reward.models=[pick_score, own_rewards:as_bright_as_asked]"
    words = (f"paths.dataset={data}", "paths.initial=null", *SHORT, *RUN, *ALONE, both)
    config = load_recipe(RECIPES["flux_dancegrpo"], RECIPE, [*words, "reward.weights=[]"])
    finish(begin(config, tmp_path / "whole"))
    finish(begin(replace(config, train=replace(config.train, iter_num=2)), tmp_path / "parts"))
    assert make("flux_senseflow", data, tmp_path / "cache", "adversarial.kind=none") == 0
    paths = replace(config.paths, cache=str(tmp_path / "cache"))
    cached = finish(begin(replace(config, paths=paths), tmp_path / "parts"))
    assert cached.parts.adapter.pipeline.text_encoder is None
    one, two = (full_state(tmp_path / name, 4, tmp_path) for name in ("whole", "parts"))
    assert [key for key in one if not torch.equal(one[key], two[key])] == []
    rows = timeless_rows(tmp_path / "whole")
    assert rows == timeless_rows(tmp_path / "parts")
    assert {"reward/pick_score", "reward/own_rewards:as_bright_as_asked"} <= rows[-1].keys()
    assert not any(name.startswith("drift/") for row in rows for name in row)
    assert (tmp_path / "whole" / "samples" / "step_0000004.png").exists()


def test_a_reward_that_takes_fields_is_refused_without_any(tmp_path):
    lines = tmp_path / "p.txt"
    lines.write_text("a dog\n")
    for data in (lines, write_pictures(tmp_path / "data")):
        inputs = read_run(configure(data, *RUN, *ALONE), RECIPES["flux_senseflow"].family)
        said = f"own_rewards:as_bright_as_asked takes fields, and paths.dataset {data} has none: "
        with pytest.raises(ValueError) as refused:
            check_networks(inputs)
        assert said in str(refused.value) and "\n" not in str(refused.value)
    inputs = read_run(configure(lines, *RUN, *ALONE, "reward.models=[own_rewards:redness]"),
                      RECIPES["flux_senseflow"].family)  # fmt: skip
    check_networks(inputs)


def test_a_run_that_goes_on_is_the_same_to_the_bit(tmp_path):
    data = write_pictures(tmp_path / "data")
    config = configure(data, *RUN)
    whole = finish(begin(config, tmp_path / "whole"))
    assert whole.parts.rewards
    shorter = replace(config, train=replace(config.train, iter_num=2))
    for settings in (shorter, config):
        finish(begin(settings, tmp_path / "parts"))
    one, two = (full_state(tmp_path / name, 4, tmp_path) for name in ("whole", "parts"))
    assert [key for key in one if not torch.equal(one[key], two[key])] == []
    assert read_card(tmp_path / "whole" / "student" / "step_0000004").eta == 0.7
    rows = timeless_rows(tmp_path / "whole")
    assert rows == timeless_rows(tmp_path / "parts")
    names = {"reward/own_rewards:redness", "reward_spread/own_rewards:redness", "grpo/advantage",
             "grpo/clipped", "grpo/diversity", "grpo/equal_groups", "loss/grpo"}  # fmt: skip
    assert all((names <= row.keys()) == (row["iteration"] % 2 == 0) for row in rows)
