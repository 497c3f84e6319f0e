"""The stock pipelines stop at the anchors, with and without guidance, from fixed noise; cps is
between their samplers, for students that rewards have trained by it.
"""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from small import make_student

from senseflow.tiny import flux, sd35, sdxl
from senseflow.tiny.ablate.trial import measure_student
from senseflow.tiny.families import (
    FAMILIES,
    Method,
    Sampler,
    family_of,
    initial_latents,
    seeds_of,
)
from senseflow.tiny.measure import load_students
from senseflow.weights.card import read_card, write_card
from senseflow.weights.student import find_student

FLUX = Path(__file__).parents[2] / "assets" / "tiny" / "flux" / "pipeline"
LADDERS = {4: [999, 749, 499, 249], 2: [999, 499], 1: [999]}


@pytest.fixture(scope="module")
def flux_sampler():
    sampler = Sampler(FLUX, ["a red seven left of a blue two on white"] * 3)
    sampler.networks["untrained"] = sampler.untrained()
    return sampler


@pytest.mark.parametrize(
    ("num_steps", "sigmas"),
    [(4, [1, 0.9045, 0.7595, 0.5128, 0]), (2, [1, 0.7595, 0]), (1, [1, 0])],
)
def test_few_steps_of_flux_are_the_anchors(flux_sampler, num_steps, sigmas):
    flux_sampler.draw(Method("teacher", num_steps, "euler"), seed=0)
    found = flux_sampler.pipeline.scheduler.sigmas
    torch.testing.assert_close(found, torch.tensor(sigmas).float(), atol=5e-5, rtol=0)


@pytest.mark.parametrize(
    ("num_steps", "sigmas"), [(4, [1, 0.9, 0.75, 0.5, 0]), (2, [1, 0.75, 0]), (1, [1, 0])]
)
def test_few_steps_of_sd35_are_the_anchors(num_steps, sigmas):
    family = FAMILIES["StableDiffusion3Pipeline"]
    own = FlowMatchEulerDiscreteScheduler(shift=sd35.SAMPLING_SHIFT).config
    scheduler = family.samplers["x0"](own)
    scheduler.set_timesteps(sigmas=family.steps(num_steps)["sigmas"])
    assert scheduler.config.stochastic_sampling
    torch.testing.assert_close(scheduler.sigmas, torch.tensor(sigmas), check_dtype=False)


@pytest.mark.parametrize("num_steps", LADDERS)
@pytest.mark.parametrize("sampler", ["lcm", "ddim"])
def test_few_steps_of_sdxl_are_the_anchors(num_steps, sampler):
    scheduler = FAMILIES["StableDiffusionXLPipeline"].samplers[sampler](sdxl.new_scheduler().config)
    scheduler.set_timesteps(num_steps)
    assert scheduler.timesteps.tolist() == LADDERS[num_steps]
    torch.testing.assert_close(scheduler.alphas_cumprod, sdxl.new_scheduler().alphas_cumprod)
    # Where the network always predicts one x_0, that is what sampling ends with.
    x_0, x_t = torch.randn(2, 8, 8, 8), torch.randn(2, 8, 8, 8)
    for t in scheduler.timesteps:
        abar = scheduler.alphas_cumprod[t]
        x_t = scheduler.step((x_t - abar.sqrt() * x_0) / (1 - abar).sqrt(), t, x_t).prev_sample
    torch.testing.assert_close(x_t, x_0, atol=1e-4, rtol=0)


def test_one_step_is_the_same_with_either_sampler(flux_sampler):
    euler, x0 = (flux_sampler.draw(Method("teacher", 1, name), 0) for name in ("euler", "x0"))
    torch.testing.assert_close(euler, x0)


@pytest.mark.parametrize(
    ("name", "config", "ends"),
    [
        ("FluxPipeline", FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).config,
         ("euler", "x0")),
        ("StableDiffusion3Pipeline", FlowMatchEulerDiscreteScheduler(shift=3.0).config,
         ("euler", "x0")),
        ("StableDiffusionXLPipeline", sdxl.new_scheduler().config, ("ddim", "lcm")),
    ],
)  # fmt: skip
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_ends_of_cps_are_the_stock_samplers(name, config, ends, eta):
    """Step by step from the same samples, with the noise of the same seed."""
    family, few = FAMILIES[name], {"num_inference_steps": 4}
    if name != "StableDiffusionXLPipeline":
        few = {"sigmas": family.steps(4)["sigmas"], "mu": 1.15}
    ours = family.scheduler(config, Method("student", 4, "cps", eta=eta))
    theirs = family.scheduler(config, Method("student", 4, ends[int(eta)]))
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(**few)
    torch.testing.assert_close(ours.timesteps, theirs.timesteps, check_dtype=False)
    for t in theirs.timesteps:
        own, x = (
            (torch.manual_seed(3), s.step(x.sin(), t, x).prev_sample)[1] for s in (ours, theirs)
        )
        torch.testing.assert_close(own, x, rtol=1e-6, atol=1e-6 * float(x.abs().max()))


def student_of(eta: float | None, run: Path) -> Path:
    """A run whose student's card has this eta."""
    folder = find_student(make_student("flux", run)).weights.parent
    write_card(folder, dataclasses.replace(read_card(folder), eta=eta))
    return run


def test_students_are_measured_by_the_sampler_that_rewards_have_trained_too(tmp_path):
    sampler = Sampler(FLUX, ["a red seven left of a blue two on white"])
    runs = {str(eta): student_of(eta, tmp_path / str(eta)) for eta in (0.7, 1, 0, None)}
    methods = load_students(sampler, [f"{name}={run}" for name, run in runs.items()], (8, 4))
    between = Method("0.7", 4, "cps", eta=0.7)
    by_cps = [method for method in methods if method.sampler == "cps"]
    assert by_cps == [Method("0.7", 8, "cps", eta=0.7), between]
    assert between.label() == "0.7, 4 steps, cps 0.7"
    others = [sampler.draw(Method("0.7", 4, name), 0) for name in ("euler", "x0")]
    apart = [(sampler.draw(between, 0) - other).abs().max() for other in others]
    assert min(apart) > 0.05
    ruler = SimpleNamespace(sampler=sampler, measure=lambda method: {"eta": method.eta})
    rows = [measure_student(ruler, run) for run in runs.values()]
    few = [f"{num} steps" for num in (8, 4, 2, 1)] + ["4 steps, euler"]
    assert [list(row) for row in rows] == [[*few, "4 steps, cps 0.7"], few, few, few]
    assert rows[0]["4 steps, cps 0.7"] == {"eta": 0.7}


def test_guidance_is_for_the_teacher_and_for_those_that_embed_it(flux_sampler):
    flux_sampler.networks["embeds"] = flux_sampler.networks["teacher"]
    guidance = {name: flux_sampler.guidance_of(name) for name in flux_sampler.networks}
    assert guidance == {"teacher": 3.5, "untrained": 0.0, "embeds": 3.5}
    assert not flux_sampler.networks["untrained"].config.guidance_embeds


def test_pictures_do_not_depend_on_the_batch(flux_sampler):
    method = Method("untrained", 4, "euler")
    together, alone = flux_sampler.draw(method, 3), flux_sampler.draw(method, 3, batch_size=1)
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)
    assert not torch.equal(together[0], together[1])
    noise = initial_latents(range(3), 3, (2, 2))
    assert torch.equal(noise[2:], initial_latents(range(2, 3), 3, (2, 2)))


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no model_index"):
        family_of(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "PixArtPipeline"}))
    with pytest.raises(ValueError, match=r"PixArtPipeline.*FluxPipeline"):
        family_of(tmp_path)


def test_packing_is_undone_by_the_pipeline():
    latents = torch.randn(2, 8, 8, 8)
    packed = flux.pack(latents)
    assert packed.shape[1:] == FAMILIES["FluxPipeline"].latent_shape
    torch.testing.assert_close(flux.FluxPipeline._unpack_latents(packed, 32, 32, 4), latents)


def test_processes_draw_the_same_pictures_in_order(flux_sampler):
    jobs = [*seeds_of(Method("teacher", 1, "x0"), 3), (Method("teacher", 2, "x0"), 0)]
    with flux_sampler.several(2) as draw:
        drawn = [*draw(jobs)]
    assert len(drawn) == 4 and not np.array_equal(drawn[0], drawn[1])
    for job, pictures in zip(jobs, drawn, strict=True):
        assert np.array_equal(pictures, flux_sampler.draw(*job).numpy())
