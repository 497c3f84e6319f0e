"""Rendering is deterministic, keeps scans apart, and writes the trainers' data format."""

import json

import pytest
import torch
from PIL import Image

from senseflow.tiny.captions import is_held_out, split_scenes
from senseflow.tiny.pictures import (
    NUM_TRAIN_SCANS,
    evaluation_prompts,
    main,
    render,
    scans_by_digit,
    write_dataset,
)


def test_rendering_depends_on_its_generator_alone():
    scenes = split_scenes()[0][::3000]
    first, again, other = (
        render(scenes, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert first.shape == (len(scenes), 3, 32, 32)
    assert first.min() >= -1 and first.max() <= 1
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_scans_are_split_without_overlap():
    trained, held_out = (torch.cat(scans_by_digit(side)).flatten(1) for side in (False, True))
    assert len(trained) == NUM_TRAIN_SCANS
    assert len(held_out) == 1797 - NUM_TRAIN_SCANS
    assert torch.cdist(trained, held_out).min() > 0


def test_dataset_and_prompts(tmp_path):
    write_dataset(tmp_path, num=8, seed=0, num_prompts=20)
    listing = json.loads((tmp_path / "data.json").read_text())
    assert {key: len(values) for key, values in listing.items()} == {
        "keys": 8,
        "image_paths": 8,
        "prompts": 8,
    }
    assert not any(map(is_held_out, listing["prompts"]))
    assert Image.open(tmp_path / listing["image_paths"][0]).size == (32, 32)
    for name, held_out in (("train", False), ("heldout", True)):
        prompts = (tmp_path / f"prompts_{name}.txt").read_text().splitlines()
        assert prompts == evaluation_prompts(20, held_out)
        assert all(is_held_out(prompt) == held_out for prompt in prompts)


def test_too_many_prompts_are_refused():
    with pytest.raises(ValueError, match="5000"):
        evaluation_prompts(5000, held_out=True)


def test_the_command_says_what_it_wrote_and_what_is_too_much(tmp_path, capsys, caplog):
    caplog.set_level("INFO")
    words = ["--output", str(tmp_path / "a"), "--num", "2", "--num_prompts"]
    assert main([*words, "3"]) == 0
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{tmp_path / 'a' / 'data.json'}: 2 pictures with captio")
    assert main([*words, "999999"]) == 2
    assert capsys.readouterr().err.startswith("error: --num_prompts 999999: there are ")
    (tmp_path / "file").write_text("")
    assert main(["--output", str(tmp_path / "file"), "--num", "2"]) == 2
    assert "is a file: name a folder" in capsys.readouterr().err
