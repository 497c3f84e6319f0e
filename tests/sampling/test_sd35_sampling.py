"""SD3.5 on the command line against StableDiffusion3Pipeline's own call."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import CASES
from command_line import (
    PROMPTS,
    call,
    error_of,
    grey_levels_apart,
    only_picture,
    pictures,
    prompt_flags,
    sidecars,
)
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from sd35_pipeline import MAX_SIDE, UNIT, transformer
from student_networks import load_network

from senseflow.teachers.sd35.family import SD35, SD35_LARGE


@pytest.fixture(scope="module", params=["sd35", "sd35_large"])
def given(request, tmp_path_factory):
    """(family, base, the student's network, its component folder without a card)."""
    case = CASES[request.param]
    network = case.student()
    folder = tmp_path_factory.mktemp("student") / "plain"
    network.save_pretrained(folder)
    return case.family, request.getfixturevalue(case.base), network, folder


def stock(base: Path, network=None, dtype=torch.float32) -> StableDiffusion3Pipeline:
    replaced = {"transformer": network} if network is not None else {}
    pipeline = StableDiffusion3Pipeline.from_pretrained(base, torch_dtype=dtype, **replaced)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn(pipeline, seed: int, prompt: str, **call) -> np.ndarray:
    """One image at batch 1, all noise from torch's own generator."""
    torch.manual_seed(seed)
    call = dict(height=24, width=32, max_sequence_length=16, guidance_scale=1.0) | call
    return np.array(pipeline(prompt, **call).images[0])


def test_euler_is_the_stock_pipeline_with_unshifted_sigmas(given, tmp_path):
    """Its own shift 3 makes 1, .9, .75, .5 of them; ours are given shifted, and shifted once."""
    family, base, network, folder = given
    flags = ["--checkpoint", folder, "--height", 24, "--width", 32, "--sampler", "euler"]
    assert call(family, base, *flags, *prompt_flags(), "--output_dir", tmp_path) == 0
    pipeline = stock(base, network)
    assert pipeline.scheduler.config.shift == 3
    for seed, (ours, prompt) in enumerate(zip(pictures(tmp_path).values(), PROMPTS, strict=True)):
        theirs = drawn(pipeline, seed, prompt, sigmas=[1, 0.75, 0.5, 0.25])
        assert grey_levels_apart(ours, theirs) <= 1
    assert pipeline.scheduler.sigmas[:-1].tolist() == pytest.approx([1, 0.9, 0.75, 0.5], abs=1e-6)
    assert sidecars(tmp_path)[0]["sigmas"] == [1.0, 0.9, 0.75, 0.5]


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_x0_is_the_stock_stochastic_scheduler(steps, given, tmp_path):
    family, base, network, folder = given
    flags = ["--checkpoint", folder, "--height", 24, "--width", 32, "--steps", steps, "--seed", 5]
    assert call(family, base, *flags, "--prompt", PROMPTS[0], "--output_dir", tmp_path) == 0
    pipeline = stock(base, network)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0, stochastic_sampling=True)
    unshifted = [1 - step / steps for step in range(steps)]
    sigmas = [3 * u / (1 + 2 * u) for u in unshifted]
    theirs = drawn(pipeline, 5, PROMPTS[0], sigmas=sigmas)
    assert grey_levels_apart(only_picture(tmp_path), theirs) <= 1
    assert sidecars(tmp_path)[0]["sigmas"] == pytest.approx(sigmas, abs=1e-9)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [(MAX_SIDE, 20), (4, 8)])
def test_positions_at_other_sizes_than_trained(size, dtype, given, tmp_path):
    """The table of positions is cut as by the stock pipeline with diffusers' own loading."""
    family, base, _, folder = given
    flags = ["--checkpoint", folder, "--height", size[0], "--width", size[1], "--dtype", dtype]
    flags += ["--sampler", "euler", "--prompt", PROMPTS[0], "--output_dir", tmp_path]
    assert call(family, base, *flags) == 0
    pipeline = stock(base, dtype=getattr(torch, dtype))
    loaded = type(pipeline.transformer).from_pretrained(folder, torch_dtype=getattr(torch, dtype))
    pipeline.transformer = loaded
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    theirs = drawn(
        pipeline, 0, PROMPTS[0], height=size[0], width=size[1], sigmas=[1, 0.9, 0.75, 0.5]
    )
    assert np.array_equal(only_picture(tmp_path), theirs)


def test_the_files_own_positions_are_kept(given, tmp_path):
    network = given[2]
    state = {**network.state_dict()}
    state["pos_embed.pos_embed"] = state["pos_embed.pos_embed"] + 1
    torch.save(state, tmp_path / "moved.pth")
    student = load_network(tmp_path / "moved.pth", given[3] / "config.json")
    assert torch.equal(student.pos_embed.pos_embed, state["pos_embed.pos_embed"])
    del state["pos_embed.pos_embed"]
    torch.save(state, tmp_path / "without.pth")
    with pytest.raises(ValueError, match=r"1 missing \(pos_embed\.pos_embed\)"):
        load_network(tmp_path / "without.pth", given[3] / "config.json")


def test_sizes(given, tmp_path, capsys):
    family, base, _, folder = given
    flags = ["--checkpoint", folder, "--output_dir", tmp_path / "out"]
    text = error_of(capsys, family, base, *flags, "--height", MAX_SIDE + UNIT)
    assert "--height 52: the network has positions for 48 pixels" in text
    text = error_of(capsys, family, base, *flags, "--width", UNIT + 2)
    assert "--width 6 is not a positive multiple of 4" in text
    assert call(family, base, *flags, "--prompt", "x") == 0
    assert (sidecars(tmp_path / "out")[0]["height"]) == 32  # the network's own sample_size


@pytest.mark.parametrize("sampler", [None, "x0"])
def test_teacher_mode_is_the_base_with_its_guidance(sampler, given, tmp_path):
    family, base, *_ = given
    flags = ["--teacher", "--steps", 5, "--prompt", PROMPTS[0], "--output_dir", tmp_path]
    flags += ["--sampler", sampler] if sampler else []
    assert call(family, base, *flags) == 0
    pipeline = stock(base)
    pipeline.scheduler.register_to_config(stochastic_sampling=sampler == "x0")
    guidance = {"SD3.5 Medium": 4.5, "SD3.5 Large": 3.5}[family.title]
    whole = dict(height=32, width=32, num_inference_steps=5, guidance_scale=guidance)
    theirs = drawn(pipeline, 0, PROMPTS[0], **whole)
    assert np.array_equal(only_picture(tmp_path), theirs)
    record = sidecars(tmp_path)[0]
    assert record["guidance"] == guidance and record["steps"] == len(record["sigmas"]) == 5
    other = drawn(pipeline, 0, PROMPTS[0], **whole | {"guidance_scale": 1.0})
    assert not np.array_equal(theirs, other)


def test_teachers_own_steps(sd35_folder, sd35_large_folder, tmp_path):
    for family, base, steps in ((SD35, sd35_folder, 40), (SD35_LARGE, sd35_large_folder, 50)):
        out = tmp_path / str(steps)
        flags = ["--teacher", "--prompt", "x", "--height", 4, "--width", 4, "--output_dir", out]
        assert call(family, base, *flags) == 0
        assert len(sidecars(out)[0]["sigmas"]) == steps


def test_a_base_without_its_transformer_serves_both_sizes(sd35_folder, tmp_path):
    """The rest of the two is the same; the student brings its config."""
    base = tmp_path / "base"
    shutil.copytree(sd35_folder, base)
    shutil.rmtree(base / "transformer")
    for family, large in ((SD35, False), (SD35_LARGE, True)):
        folder = tmp_path / f"student{large}"
        transformer(large).save_pretrained(folder)
        flags = ["--checkpoint", folder, "--prompt", "x", "--output_dir", tmp_path / str(large)]
        assert call(family, base, *flags) == 0
