"""The embedded reward: what it is taught with, and what it says of pictures it has not seen."""

from pathlib import Path

import pytest
import torch

from senseflow.common.ranks import Ranks
from senseflow.config.config import load_config
from senseflow.engine.rewards import open_rewards
from senseflow.tiny.captions import ATTRIBUTES, all_scenes, captions_of, split_scenes
from senseflow.tiny.pictures import draw_scenes, render
from senseflow.tiny.reward import altered, draw_relatives, new_reward, right_above_wrong
from senseflow.tiny.text import new_clip_tokenizer

FOLDER = Path("assets/tiny/common/reward")
RECIPE = "configs/FLUX/flux_dancegrpo_tiny.yaml"


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("place", range(6))
def test_one_attribute_is_wrong_and_what_is_left_is_a_scene(place):
    scenes = draw_scenes(split_scenes()[0], 400, generator())
    wrong = altered(scenes, torch.full((400,), place), generator(1))
    assert ((scenes != wrong).nonzero()[:, 1] == place).all() and (scenes != wrong).sum() == 400
    known = set(all_scenes())
    assert all(tuple(scene) in known for scene in wrong.tolist())
    assert len(wrong[:, place].unique()) == len(scenes[:, place].unique())


def test_relatives_differ_from_their_scene_in_one_attribute_each_in_another():
    drawn = draw_relatives(split_scenes()[0], generator())
    scene, *wrong = drawn.unflatten(0, (-1, 16))
    places = torch.stack([(scene != other).float().argmax(1) for other in wrong], 1)
    assert all((scene != other).sum(1).eq(1).all() for other in wrong)
    assert all(len(set(row)) == 3 for row in places.tolist())


def test_the_figures_are_shares_of_pictures_above_their_wrong_ones(monkeypatch):
    """With a reward that reads the colours alone, whatever else is drawn."""
    tokenizer = new_clip_tokenizer()
    reward, colours = new_reward(tokenizer), torch.eye(6)

    def drawn(scenes, generator, held_out_scans=False):
        assert held_out_scans
        return torch.cat([colours[scenes[:, 2]], colours[scenes[:, 3]]], 1)[:, :, None, None]

    def seen(pixels):
        return type("Output", (), {"pooler_output": pixels.flatten(1)})

    def said(model, tokenizer, scenes):
        return torch.cat([colours[scenes[:, 2]], colours[scenes[:, 3]]], 1)

    monkeypatch.setattr("senseflow.tiny.reward.render", drawn)
    monkeypatch.setattr("senseflow.tiny.reward.normalise", lambda x: x)
    monkeypatch.setattr("senseflow.tiny.reward.text_of", said)
    monkeypatch.setattr(reward, "get_image_features", seen)
    found = right_above_wrong(reward, tokenizer, 50, generator())
    expected = dict.fromkeys([*ATTRIBUTES, "all"], 0.0) | {"colour_a": 1.0, "colour_b": 1.0}
    assert found == expected


def test_the_reward_of_the_recipes_puts_right_pictures_above_wrong_ones():
    """As a run opens it, of unseen scans: above every other digit, colour, background, relation."""
    rewards = open_rewards(load_config(RECIPE), Ranks(0, 1, torch.device("cpu"), None))
    scenes = draw_scenes(split_scenes()[1], 100, generator(2))
    prompts = captions_of(scenes)

    def scores(drawn):
        return rewards.score(render(drawn, generator(3), held_out_scans=True), prompts)[0]

    right = scores(scenes)
    for place, least in enumerate((0.9, 0.9, 0.98, 0.98, 0.98, 0.98)):
        wrong = scenes.clone()
        others = scenes[torch.randperm(100, generator=generator(4))]
        wrong[:, place] = others[:, place]
        told = (wrong != scenes).any(1) & (wrong[:, 2] != wrong[:, 3])
        assert told.sum() > 30
        assert (right > scores(wrong))[told].double().mean() > least, ATTRIBUTES[place]
    pictures = render(scenes, generator(3)).requires_grad_()
    rewards.loss(pictures, prompts).backward()
    assert pictures.grad.abs().amax((1, 2, 3)).min() > 0


def test_the_reward_is_small():
    assert (FOLDER / "model.safetensors").stat().st_size < 0.8e6
