"""The SD3.5 adapter against StableDiffusion3Pipeline's own call, schedule and files."""

from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from sd35_pipeline import MAX_SIDE, UNIT
from teacher_parts import (
    CPU,
    PROMPTS,
    Inputs,
    assert_same_weights,
    built,
    changed_copy,
    settings_of,
    spy_on_steps,
)
from text_parts import T5_LENGTH

from senseflow.teachers.sd35.family import SD35, SD35_LARGE

LENGTH = 12
TIMES = (1000.0, 750.0, 500.0, 250.0)
UNSHIFTED = [1.0, 0.75, 0.5, 0.25]
SCALE = 4.5
TOLERANCE = {  # of guidance, which the pipeline takes in its own type and we in float32
    torch.float32: dict(atol=1e-5, rtol=1e-5),
    torch.bfloat16: dict(atol=0.08, rtol=0.02),
}


def stock(folder, dtype=torch.float32) -> StableDiffusion3Pipeline:
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, torch_dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def scheduler_of(folder) -> FlowMatchEulerDiscreteScheduler:
    """At the anchors: the unshifted sigmas, which it shifts itself."""
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
    scheduler.set_timesteps(sigmas=UNSHIFTED)
    return scheduler


def seen_in_the_pipeline(folder, dtype, height, width):
    """Per step of the pipeline's own call: the transformer's inputs and output, and the guided
    prediction that its scheduler is given."""
    pipeline, seen = stock(folder, dtype), []
    guided = spy_on_steps(pipeline)

    def hook(module, args, kwargs, output):
        seen.append((dict(kwargs), output[0].clone()))

    pipeline.transformer.register_forward_hook(hook, with_kwargs=True)
    pipeline(
        PROMPTS,
        height=height,
        width=width,
        num_inference_steps=4,
        sigmas=UNSHIFTED,
        guidance_scale=SCALE,
        max_sequence_length=LENGTH,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
    )
    return [(*one, prediction) for one, prediction in zip(seen, guided, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(32, 32), (20, 36)])
@pytest.mark.parametrize("family", [SD35, SD35_LARGE])
def test_prediction_equals_the_pipelines_own_call_at_all_anchors(
    family, size, dtype, sd35_folder, sd35_large_folder
):
    """Prompts, the null prompt, time and guidance, in the type the pipeline runs in."""
    folder = sd35_folder if family is SD35 else sd35_large_folder
    settings = settings_of(folder, size, LENGTH, compute_dtype=dtype)
    adapter, teacher = family.load_adapter(settings, CPU, built), built(family.teacher(settings))
    inputs = Inputs(teacher)
    cond = adapter.encode_prompts(PROMPTS)
    anchors = family.anchors(settings, TIMES).times
    seen = seen_in_the_pipeline(folder, dtype, *size)
    for tau, (given, output, guided) in zip(anchors, seen, strict=True):
        x_t = given["hidden_states"][:2].float()
        t, scale = torch.full((2,), tau), torch.full((2,), SCALE)
        assert x_t.shape[1:] == adapter.latent_shape()
        with torch.no_grad():
            v = adapter.predict_guided(teacher, x_t, t, cond, scale)
        received = inputs.latest
        for name in ("hidden_states", "encoder_hidden_states", "timestep"):
            assert received[name].dtype == given[name].dtype
            assert torch.equal(received[name], given[name]), name
        ours, theirs = received["pooled_projections"], given["pooled_projections"]
        assert torch.equal(ours[2:], theirs[2:])
        # no prompt is encoded once here, per sample there: float32's last digits
        torch.testing.assert_close(ours[:2], theirs[:2], rtol=0, atol=2e-6)
        uncond, with_prompt = output.float().chunk(2)
        torch.testing.assert_close(v, uncond + SCALE * (with_prompt - uncond), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(v, guided.float(), **TOLERANCE[dtype])
        with torch.no_grad():
            plain = adapter.predict(teacher, x_t, t, cond)
        torch.testing.assert_close(plain, with_prompt, **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prompts_and_no_prompt_are_the_pipelines(sd35_folder, dtype):
    settings = settings_of(sd35_folder, length=LENGTH, compute_dtype=dtype)
    adapter = SD35.load_adapter(settings, CPU, built)
    pipeline = stock(sd35_folder, dtype)
    cond = adapter.encode_prompts(PROMPTS)
    null = adapter.null(cond)
    for mine, prompts in ((cond, PROMPTS), (null, "")):
        with torch.no_grad():
            embeds, _, pooled, _ = pipeline.encode_prompt(
                prompts, None, None, max_sequence_length=LENGTH, do_classifier_free_guidance=False
            )
        assert mine.prompt_embeds.dtype == dtype and len(mine.pooled) == 2
        assert torch.equal(mine.prompt_embeds, embeds.expand(2, -1, -1))
        assert torch.equal(mine.pooled, pooled.expand(2, -1))
    assert not torch.equal(null.pooled, torch.zeros_like(null.pooled))
    assert cond.prompt_embeds.shape[1] == 77 + LENGTH


def test_encoders_are_frozen_and_in_eval_mode(sd35_folder):
    adapter = SD35.load_adapter(settings_of(sd35_folder), CPU, built)
    parts = [p for p in adapter.pipeline.components.values() if isinstance(p, torch.nn.Module)]
    assert len(parts) == 4  # three text encoders and the VAE
    assert not any(part.training for part in parts)
    assert not any(p.requires_grad for part in parts for p in part.parameters())


def test_anchors_and_their_times_are_those_of_diffusers_own_scheduler(sd35_folder):
    """The path takes the index before the shift; the network is told what the scheduler would."""
    settings, scheduler = settings_of(sd35_folder), scheduler_of(sd35_folder)
    path, anchors = SD35.path(settings), SD35.anchors(settings, TIMES)
    assert anchors.times == TIMES and anchors.end == path.clean
    _, sigma = path.alpha_sigma(torch.tensor(anchors.times))
    assert sigma.tolist() == pytest.approx([1.0, 0.9, 0.75, 0.5])
    assert torch.equal(sigma, scheduler.sigmas[:-1])
    assert torch.equal(1000 * sigma, scheduler.timesteps)
    on_the_card = SD35.sampled_at(path, anchors)
    assert on_the_card == pytest.approx(scheduler.sigmas[:-1].tolist(), rel=1e-6)


def test_path_is_the_schedulers_shift_at_every_index(sd35_folder, tmp_path):
    for shift in (3.0, 1.5):
        folder = with_scheduler(sd35_folder, tmp_path / str(shift), shift=shift)
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
        index = torch.arange(1000, 0, -1)
        alpha, sigma = SD35.path(settings_of(folder)).alpha_sigma(index)
        torch.testing.assert_close(sigma, scheduler.sigmas[:1000], rtol=3e-7, atol=0)
        assert torch.equal(alpha, 1 - sigma)


def with_scheduler(folder, target, **config) -> Path:
    return changed_copy(folder, target, "scheduler/scheduler_config.json", **config)


@pytest.mark.parametrize("shift", [3.0, 1.0, 6.0])
def test_a_given_shift_is_the_whole_shift_of_the_anchors(sd35_folder, shift):
    """The path's own shift is part of it: shifts multiply."""
    settings = settings_of(sd35_folder, shift=shift)
    path, anchors = SD35.path(settings), SD35.anchors(settings, TIMES)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=UNSHIFTED)
    _, sigma = path.alpha_sigma(torch.tensor(anchors.times))
    torch.testing.assert_close(sigma, scheduler.sigmas[:-1], rtol=1e-6, atol=0)
    assert path == SD35.path(settings_of(sd35_folder))  # laws of t keep the folder's own shift


def test_a_dynamic_shift_is_refused(sd35_folder, tmp_path):
    folder = with_scheduler(sd35_folder, tmp_path / "dynamic", use_dynamic_shifting=True)
    refused(SD35, "one shift, not a dynamic one", folder)


def test_vae_both_ways_as_the_pipeline_scales_it(sd35_folder):
    adapter, size = SD35.load_adapter(settings_of(sd35_folder), CPU, built), (32, 32)
    vae, z = adapter.pipeline.vae, torch.randn(2, *adapter.latent_shape()).requires_grad_()
    pipeline = stock(sd35_folder)
    pipeline.scheduler.step = lambda prediction, t, latents, **_: (z.detach(),)
    call = dict(height=size[0], width=size[1], num_inference_steps=1, output_type="pt")
    theirs = pipeline(PROMPTS, max_sequence_length=LENGTH, **call).images
    ours = adapter.decode(z)
    torch.testing.assert_close((ours.detach() / 2 + 0.5).clamp(0, 1), theirs)
    ours.sum().backward()
    assert z.grad.abs().sum() > 0 and all(p.grad is None for p in vae.parameters())

    images, eps = torch.rand(2, 3, *size) * 2 - 1, torch.randn(2, *adapter.latent_shape())
    posterior = vae.encode(images).latent_dist
    expected = (posterior.mean + posterior.std * eps - 0.0609) * 1.5305
    torch.testing.assert_close(adapter.draw_latents(adapter.encode_images(images), eps), expected)


@pytest.mark.parametrize("family", [SD35, SD35_LARGE])
def test_student_is_the_teacher(family, sd35_folder, sd35_large_folder):
    folder = sd35_folder if family is SD35 else sd35_large_folder
    settings = settings_of(folder)
    teacher, student = family.teacher(settings), family.student(settings)
    assert not any(p.requires_grad for p in teacher.network.parameters())
    assert all(p.requires_grad for p in student.network.parameters())
    assert len(student.blocks) == (2 if family is SD35 else 3)
    assert_same_weights(built(student), built(teacher))
    half = family.student(settings_of(folder, compute_dtype=torch.bfloat16))
    assert {p.dtype for p in half.network.parameters()} == {torch.float32}


def refused(family, message: str, folder: Path, *args, **rest) -> None:
    with pytest.raises(ValueError, match=message):
        family.require(settings_of(folder, *args, **rest))


def test_settings_that_do_not_fit_are_refused(sd35_folder, flux_folder, sdxl_folder, tmp_path):
    refused(SD35, "no model_index.json", tmp_path)
    refused(SD35, "holds a FluxPipeline", flux_folder)
    refused(SD35, "holds a StableDiffusionXLPipeline", sdxl_folder)
    refused(SD35, rf"\[32, 34\].*multiples of {UNIT}", sd35_folder, (32, 34))
    larger = MAX_SIDE + UNIT
    refused(SD35, f"ends at {MAX_SIDE} pixels", sd35_folder, (32, larger))
    SD35.require(settings_of(sd35_folder, (MAX_SIDE, MAX_SIDE)))
    refused(SD35, "max_sequence_length is missing", sd35_folder, length=None)
    refused(SD35, f"{T5_LENGTH + 1}.*was made for {T5_LENGTH}", sd35_folder, length=T5_LENGTH + 1)
    SD35.require(settings_of(sd35_folder, length=T5_LENGTH))
    refused(SD35, "for FLUX alone", sd35_folder, fold_guidance=3.5)
    refused(SD35, "for FLUX alone", sd35_folder, linked=tmp_path)


def test_each_size_is_told_by_its_dual_attention(sd35_folder, sd35_large_folder):
    message = (
        "holds SD3.5 Medium, .* recipe of SD3.5 Large: sh .*train_SD35_senseflow.sh distils it"
    )
    refused(SD35_LARGE, message, sd35_folder)
    SD35_LARGE.require(settings_of(sd35_large_folder))
    refused(SD35_LARGE, "multiples of", sd35_large_folder, (32, 34))
