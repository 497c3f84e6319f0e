"""Captions say all six attributes, and the held-out ones are really held out."""

import pytest
import torch

from senseflow.tiny.captions import (
    all_scenes,
    attributes_of,
    caption_of,
    captions_of,
    is_held_out,
    parse_caption,
    split_scenes,
)


def test_every_caption_parses_back():
    scenes = all_scenes()
    assert len(scenes) == 24_000
    assert len({caption_of(scene) for scene in scenes}) == len(scenes)
    assert all(parse_caption(caption_of(scene)) == scene for scene in scenes)


def test_attributes_round_trip():
    attributes = split_scenes()[0][:50]
    assert torch.equal(attributes_of(captions_of(attributes)), attributes)


@pytest.mark.parametrize(
    "caption",
    ["", "a red seven on white", "a red seven above a red two on white", "a red two above a"],
)
def test_other_sentences_are_refused(caption):
    with pytest.raises(ValueError, match="digits"):
        parse_caption(caption)


def test_held_out_share_is_disjoint_and_about_a_tenth():
    trained, held_out = (set(captions_of(part)) for part in split_scenes())
    assert not trained & held_out
    assert len(trained) + len(held_out) == 24_000
    assert 0.08 < len(held_out) / 24_000 < 0.12
    assert all(is_held_out(caption) for caption in held_out)
