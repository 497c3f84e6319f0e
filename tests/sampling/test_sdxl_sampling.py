"""SDXL on the command line against StableDiffusionXLPipeline's own call and DDIM written out."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import sdxl_pipeline
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
from diffusers import EulerDiscreteScheduler, LCMScheduler, StableDiffusionXLPipeline
from torch import nn

from senseflow.teachers.family import Plan
from senseflow.teachers.schedulers import Float32LCMScheduler
from senseflow.teachers.sdxl.family import SDXL

ANCHORS = [999, 749, 499, 249]
SIZE = ("--height", 24, "--width", 32)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return CASES["sdxl"].student()


@pytest.fixture(scope="module")
def student(network, tmp_path_factory) -> Path:
    """A component folder without a card."""
    folder = tmp_path_factory.mktemp("student") / "unet"
    network.save_pretrained(folder)
    return folder


def stock(base: Path, **replaced) -> StableDiffusionXLPipeline:
    pipeline = StableDiffusionXLPipeline.from_pretrained(base, **replaced)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn(pipeline, seed: int, prompt: str, **call) -> np.ndarray:
    generator = torch.Generator().manual_seed(seed)
    call = dict(height=24, width=32, guidance_scale=0.0, generator=generator) | call
    return np.array(pipeline(prompt, **call).images[0])


def test_x0_is_stock_lcm_at_four_steps(sdxl_folder, network, student, tmp_path):
    flags = ["--checkpoint", student, *SIZE, *prompt_flags(), "--output_dir", tmp_path]
    assert call(SDXL, sdxl_folder, *flags) == 0
    pipeline = stock(sdxl_folder, unet=network)
    config = pipeline.scheduler.config
    pipeline.scheduler = LCMScheduler.from_config(config, original_inference_steps=4)
    for seed, (ours, prompt) in enumerate(zip(pictures(tmp_path).values(), PROMPTS, strict=True)):
        assert np.array_equal(ours, drawn(pipeline, seed, prompt, num_inference_steps=4))
    assert pipeline.scheduler.timesteps.tolist() == ANCHORS == sidecars(tmp_path)[0]["timesteps"]


@pytest.mark.parametrize(
    ("flags", "timesteps"),
    [
        (["--steps", 1], [999]),
        (["--steps", 2], [999, 499]),
        (["--steps", 2, "--two_steps", "first"], [999, 749]),
        (["--steps", 8], [999, 874, 749, 624, 499, 374, 249, 124]),
        (["--timesteps", 999, 249], [999, 249]),
    ],
)
def test_other_steps(flags, timesteps, sdxl_folder, network, student, tmp_path):
    flags = [*flags, "--checkpoint", student, *SIZE, "--prompt", PROMPTS[0]]
    assert call(SDXL, sdxl_folder, *flags, "--output_dir", tmp_path) == 0
    assert sidecars(tmp_path)[0]["timesteps"] == timesteps
    pipeline = stock(sdxl_folder, unet=network)
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    theirs = drawn(pipeline, 0, PROMPTS[0], timesteps=timesteps)
    assert np.array_equal(only_picture(tmp_path), theirs)


@torch.no_grad()
def ddim(pipeline, network, timesteps: list[int], seed: int, size=(24, 32)) -> np.ndarray:
    """The student's ODE from pure noise by DDIM with eta 0, in float64 between the networks."""
    prompt_embeds, _, pooled, _ = pipeline.encode_prompt(
        PROMPTS[0], do_classifier_free_guidance=False
    )
    height, width = size
    time_ids = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32)
    added = {"text_embeds": pooled, "time_ids": time_ids}
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    abar = torch.cumprod(1 - betas, 0)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 4, height // 2, width // 2, generator=generator).double()
    for t, s in zip(timesteps, [*timesteps[1:], None], strict=True):
        eps = network(x.float(), t, prompt_embeds, added_cond_kwargs=added).sample.double()
        x_0 = (x - (1 - abar[t]).sqrt() * eps) / abar[t].sqrt()
        x = x_0 if s is None else abar[s].sqrt() * x_0 + (1 - abar[s]).sqrt() * eps
    image = pipeline.vae.decode(x.float() / 0.13025).sample
    return np.array(pipeline.image_processor.postprocess(image)[0])


@pytest.mark.parametrize("timesteps", [ANCHORS, [999, 499], [999, 749], [999]])
def test_euler_is_ddim_from_unit_noise(timesteps, sdxl_folder, network, student, tmp_path):
    flags = ["--checkpoint", student, *SIZE, "--prompt", PROMPTS[0], "--sampler", "euler"]
    flags += ["--timesteps", *timesteps, "--seed", 7, "--output_dir", tmp_path]
    assert call(SDXL, sdxl_folder, *flags) == 0
    theirs = ddim(stock(sdxl_folder), network, timesteps, 7)
    assert grey_levels_apart(only_picture(tmp_path), theirs) <= 1


@pytest.mark.parametrize("sampler", ["x0", "euler"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_the_networks_first_input_is_the_noise_itself(sampler, spacing, sdxl_folder, network):
    plan = Plan(4, sampler, ANCHORS, None, None, 24, 32)
    pipeline = SDXL.open_pipeline(sdxl_folder, lambda: network, torch.float32)
    own = EulerDiscreteScheduler.from_config(pipeline.scheduler.config, timestep_spacing=spacing)
    pipeline.scheduler = SDXL.make_scheduler(own, plan)
    inputs = []
    hook = network.register_forward_pre_hook(lambda module, args: inputs.append(args))
    SDXL.sample(pipeline, [PROMPTS[0]], [torch.Generator().manual_seed(2)], plan)
    hook.remove()
    noise = torch.randn(1, 4, 12, 16, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(inputs[0][0], noise, rtol=1e-6, atol=0)
    assert [float(t) for _, t in inputs] == ANCHORS and all(len(x) == 1 for x, _ in inputs)


@pytest.mark.parametrize("sampler", [None, "x0", "cps"])
def test_teacher_mode_is_the_base_with_its_guidance(sampler, sdxl_folder, tmp_path):
    flags = ["--teacher", "--prompt", PROMPTS[0], "--output_dir", tmp_path, *SIZE]
    flags += ["--sampler", sampler, "--steps", 5] if sampler else []
    flags += ["--eta", 1] if sampler == "cps" else []
    assert call(SDXL, sdxl_folder, *flags) == 0
    pipeline, steps = stock(sdxl_folder), 5 if sampler else 40
    if sampler:
        config = pipeline.scheduler.config
        pipeline.scheduler = LCMScheduler.from_config(config, original_inference_steps=5)
    theirs = drawn(pipeline, 0, PROMPTS[0], guidance_scale=5.0, num_inference_steps=steps)
    assert grey_levels_apart(only_picture(tmp_path), theirs) <= (sampler == "cps")
    record = sidecars(tmp_path)[0]
    assert record["guidance"] == 5 and len(record["timesteps"]) == record["steps"] == steps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("force_upcast", [True, False])
def test_the_vae_decodes_in_float32_if_it_says_so(
    dtype, force_upcast, sdxl_folder, network, tmp_path
):
    """With its weights as they are on disk: the pipeline would round them first, or not upcast."""
    base = tmp_path / "base"
    shutil.copytree(sdxl_folder, base)
    config = base / "vae" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "force_upcast": force_upcast}))
    plan = Plan(4, "x0", ANCHORS, None, None, 24, 32)
    pipeline = SDXL.open_pipeline(base, lambda: CASES["sdxl"].student().to(dtype), dtype)
    pipeline.scheduler = SDXL.make_scheduler(pipeline.scheduler, plan)
    seen = []
    pipeline.vae.decoder.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    SDXL.sample(pipeline, [PROMPTS[0]], [torch.Generator().manual_seed(2)], plan)
    assert seen == [torch.float32 if force_upcast else dtype]
    assert pipeline.text_encoder.dtype == pipeline.text_encoder_2.dtype == dtype
    stored = stock(base).vae.state_dict()
    kept = all(torch.equal(v, stored[k]) for k, v in pipeline.vae.state_dict().items())
    assert kept == force_upcast


def test_half_precision_steps_are_float32():
    scheduler, exact = (
        kind(original_inference_steps=4) for kind in (Float32LCMScheduler, LCMScheduler)
    )
    sample, eps = torch.randn(2, 1, 4, 8, 8).bfloat16()
    results = []
    for each, dtype in ((scheduler, torch.bfloat16), (exact, torch.float32)):
        each.set_timesteps(4)
        generator = torch.Generator().manual_seed(0)
        step = each.step(eps.to(dtype), each.timesteps[0], sample.to(dtype), generator=generator)
        results.append((step.prev_sample, step.denoised))
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == torch.bfloat16 and torch.equal(ours, theirs.bfloat16())


def test_classifier_weights_are_not_dropped(sdxl_folder, network, tmp_path, capsys):
    """As a fake score network of DMD2 carries them."""
    extra = {"classifier.0.weight": torch.zeros(2), "classifier.3.bias": torch.zeros(2)}
    torch.save({"model": {**network.state_dict(), **extra}}, tmp_path / "fake.pth")
    flags = ["--checkpoint", tmp_path / "fake.pth", "--output_dir", tmp_path / "out"]
    text = error_of(capsys, SDXL, sdxl_folder, *flags)
    assert "2 not part of the network (classifier.0.weight, classifier.3.bias)" in text


def test_there_is_no_t5(sdxl_folder, student, tmp_path, capsys):
    flags = ["--checkpoint", student, "--output_dir", tmp_path / "out"]
    text = error_of(capsys, SDXL, sdxl_folder, *flags, "--max_sequence_length", 77)
    assert "unrecognized arguments: --max_sequence_length" in text


def test_sizes(sdxl_folder, student, tmp_path, capsys):
    flags = ["--checkpoint", student, "--output_dir", tmp_path / "out"]
    text = error_of(capsys, SDXL, sdxl_folder, *flags, "--height", 12)
    assert f"--height 12 is not a positive multiple of {sdxl_pipeline.UNIT}" in text
    assert call(SDXL, sdxl_folder, *flags, "--prompt", "x") == 0
    assert sidecars(tmp_path / "out")[0]["width"] == 32  # the network's own sample_size
