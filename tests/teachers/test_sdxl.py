"""The SDXL adapter against StableDiffusionXLPipeline's own call, schedules and files."""

from pathlib import Path

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
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

from senseflow.core.path import ode_step
from senseflow.teachers.sdxl.family import SDXL

TIMES = (999.0, 749.0, 499.0, 249.0)
STEPS = [999, 749, 499, 249]
SCALE = 8.0
NAMES = ("sample", "timestep", "encoder_hidden_states")
SIZES = [(32, 32), (24, 40)]
TOLERANCE = {  # of guidance, which the pipeline takes in its own type and we in float32
    torch.float32: dict(atol=1e-5, rtol=1e-5),
    torch.bfloat16: dict(atol=0.1, rtol=0.02),
}


def sdxl_settings(folder, resolution=(32, 32), **rest):
    return settings_of(folder, resolution, length=None, **rest)


def stock(folder, dtype=torch.float32) -> StableDiffusionXLPipeline:
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, torch_dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def ddim(folder) -> DDIMScheduler:
    """SDXL's schedule at the anchors, ending at exactly no noise."""
    scheduler = DDIMScheduler.from_pretrained(
        folder,
        subfolder="scheduler",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == STEPS
    return scheduler


def euler(folder) -> EulerDiscreteScheduler:
    """The folder's own scheduler at the anchors."""
    scheduler = EulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
    scheduler.set_timesteps(timesteps=STEPS)
    return scheduler


def run_pipeline(pipeline, size, **call):
    """Latents of the pipeline's own call, and per step the UNet's inputs and output and the guided
    prediction that its scheduler is given."""
    seen, guided = [], spy_on_steps(pipeline)

    def hook(module, args, kwargs, output):
        seen.append((dict(zip(NAMES, args, strict=False)) | kwargs, output[0].clone()))

    pipeline.unet.register_forward_hook(hook, with_kwargs=True)
    latents = pipeline(
        PROMPTS,
        height=size[0],
        width=size[1],
        guidance_scale=SCALE,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
        **call,
    ).images
    return latents, [(*one, prediction) for one, prediction in zip(seen, guided, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES)
def test_prediction_equals_the_pipelines_own_call_at_all_anchors(sdxl_folder, size, dtype):
    """Prompts, zeros for no prompt, time ids, time and guidance, in the pipeline's type; the sample
    is what EulerDiscreteScheduler scales to unit variance."""
    settings = sdxl_settings(sdxl_folder, size, compute_dtype=dtype)
    adapter, teacher = SDXL.load_adapter(settings, CPU, built), built(SDXL.teacher(settings))
    inputs = Inputs(teacher, NAMES)
    cond = adapter.encode_prompts(PROMPTS)
    _, seen = run_pipeline(stock(sdxl_folder, dtype), size, timesteps=STEPS)
    anchors = SDXL.anchors(settings, TIMES).times
    for tau, (given, output, guided) in zip(anchors, seen, strict=True):
        x_t = given["sample"][:2].float()
        t, scale = torch.full((2,), tau), torch.full((2,), SCALE)
        assert x_t.shape[1:] == adapter.latent_shape()
        with torch.no_grad():
            eps = adapter.predict_guided(teacher, x_t, t, cond, scale)
        received = inputs.latest
        for name in ("sample", "encoder_hidden_states"):
            assert torch.equal(received[name], given[name]), name
        assert (received["timestep"] == given["timestep"]).all() and given["timestep"] == tau
        for name, theirs in given["added_cond_kwargs"].items():
            assert received["added_cond_kwargs"][name].dtype == theirs.dtype
            assert torch.equal(received["added_cond_kwargs"][name], theirs), name
        uncond, with_prompt = output.float().chunk(2)
        expected = uncond + SCALE * (with_prompt - uncond)
        torch.testing.assert_close(eps, expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(eps, guided.float(), **TOLERANCE[dtype])
        with torch.no_grad():
            plain = adapter.predict(teacher, x_t, t, cond)
        torch.testing.assert_close(plain, with_prompt, **TOLERANCE[dtype])


@pytest.mark.parametrize("size", SIZES)
def test_the_ode_from_the_top_anchor_to_the_end_is_the_pipelines_with_ddim(sdxl_folder, size):
    """Network, guidance, path and steps together: the latents of a four-step DDIM sampling."""
    pipeline = stock(sdxl_folder)
    pipeline.scheduler = ddim(sdxl_folder)
    expected, seen = run_pipeline(pipeline, size, num_inference_steps=4)
    settings = sdxl_settings(sdxl_folder, size)
    adapter, teacher = SDXL.load_adapter(settings, CPU, built), built(SDXL.teacher(settings))
    cond, path, x_t = adapter.encode_prompts(PROMPTS), adapter.path, seen[0][0]["sample"][:2]
    for tau, following in zip(TIMES, (*TIMES[1:], path.clean), strict=True):
        t = torch.full((2,), tau)
        with torch.no_grad():
            eps = adapter.predict_guided(teacher, x_t, t, cond, torch.full((2,), SCALE))
        x_t = ode_step(path, path.read(eps, x_t, t), torch.full((2,), following))
    torch.testing.assert_close(x_t, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prompts_and_no_prompt_are_the_pipelines(sdxl_folder, dtype):
    """The folder says force_zeros_for_empty_prompt."""
    adapter = SDXL.load_adapter(sdxl_settings(sdxl_folder, compute_dtype=dtype), CPU, built)
    cond = adapter.encode_prompts(PROMPTS)
    null = adapter.null(cond)
    with torch.no_grad():
        embeds, no_embeds, pooled, no_pooled = stock(sdxl_folder, dtype).encode_prompt(PROMPTS)
    assert torch.equal(cond.prompt_embeds, embeds) and torch.equal(cond.pooled, pooled)
    assert torch.equal(null.prompt_embeds, no_embeds) and torch.equal(null.pooled, no_pooled)
    assert not null.prompt_embeds.any() and not null.pooled.any()


def test_time_ids_are_the_resolution_as_original_and_target_size_uncropped(sdxl_folder):
    for height, width in ((1024, 1024), (832, 1216)):
        adapter = SDXL.load_adapter(sdxl_settings(sdxl_folder, (height, width)), CPU, built)
        shape = adapter.latent_shape()
        assert shape[1:] == (height // 2, width // 2)  # the tiny VAE's factor
        received = {}

        def network(*args, added_cond_kwargs, received=received, **_):
            received.update(added_cond_kwargs)
            return (torch.zeros(1, 4, 2, 2),)

        cond = adapter.encode_prompts(["a"])
        adapter.predict(network, torch.zeros(1, 4, 2, 2), torch.tensor([999.0]), cond)
        assert received["time_ids"].tolist() == [[height, width, 0, 0, height, width]]


def test_path_is_the_schedulers_alphas_cumprod(sdxl_folder):
    path, abar = SDXL.path(sdxl_settings(sdxl_folder)), ddim(sdxl_folder).alphas_cumprod
    alpha, sigma = path.alpha_sigma(torch.arange(1000).float())
    torch.testing.assert_close(alpha, abar.sqrt(), rtol=2e-7, atol=0)
    torch.testing.assert_close(sigma.double(), (1 - abar.double()).sqrt(), rtol=2e-7, atol=0)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(1000))
    assert path.noisiest == 999 and path.clean == -1
    assert [a.item() for a in path.alpha_sigma(torch.tensor([-1.0]))] == [1.0, 0.0]
    sigmas = euler(sdxl_folder).sigmas  # of the variance exploding form
    alpha, sigma = path.alpha_sigma(torch.tensor(TIMES))
    torch.testing.assert_close(sigma / alpha, sigmas[:-1], rtol=2e-6, atol=0)


def test_ode_step_is_ddims_and_eulers_at_the_anchors_and_to_the_end(sdxl_folder):
    path, one, other = (
        SDXL.path(sdxl_settings(sdxl_folder)),
        ddim(sdxl_folder),
        euler(sdxl_folder),
    )
    anchors = SDXL.anchors(sdxl_settings(sdxl_folder), TIMES)
    for index in range(4):
        low, high = anchors.segment(index)
        x_t, eps = torch.randn(2, 2, 4, 3, 5)
        t, s = torch.full((2,), high), torch.full((2,), low)
        ours = ode_step(path, path.read(eps, x_t, t), s)
        theirs = one.step(eps, STEPS[index], x_t, eta=0.0).prev_sample
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)
        scale = [float((sigma**2 + 1) ** 0.5) for sigma in other.sigmas[index : index + 2]]
        step = other.step(eps, other.timesteps[index], scale[0] * x_t).prev_sample
        torch.testing.assert_close(ours, step / scale[1], atol=2e-5, rtol=1e-5)


def test_a_drawn_time_is_the_same_step_for_path_and_network(sdxl_folder):
    """ISG's mid-points and DMD's t are drawn between the steps."""
    adapter = SDXL.load_adapter(sdxl_settings(sdxl_folder), CPU, built)
    seen = []

    def network(sample, timestep, *args, **_):
        seen.append(timestep)
        return (torch.zeros_like(sample),)

    t = torch.tensor([20.4, 20.6, 998.7, 0.2])
    cond, x_t = adapter.encode_prompts(["a"] * 4), torch.zeros(4, 4, 2, 2)
    adapter.predict(network, x_t, t, cond)
    assert seen[0].tolist() == [20, 21, 999, 0]
    for mine, steps in zip(
        adapter.path.alpha_sigma(t), adapter.path.alpha_sigma(seen[0]), strict=True
    ):
        assert torch.equal(mine, steps)


def test_vae_both_ways_as_the_pipelines(sdxl_folder):
    adapter = SDXL.load_adapter(sdxl_settings(sdxl_folder), CPU, built)
    z = torch.randn(2, *adapter.latent_shape()).requires_grad_()
    pipeline = stock(sdxl_folder)
    pipeline.scheduler.step = lambda prediction, t, latents, **_: (z.detach(),)
    theirs = pipeline(PROMPTS, height=32, width=32, num_inference_steps=1, output_type="pt").images
    ours = adapter.decode(z)
    torch.testing.assert_close((ours.detach() / 2 + 0.5).clamp(0, 1), theirs)
    ours.sum().backward()
    assert z.grad.abs().sum() > 0
    assert all(p.grad is None for p in adapter.pipeline.vae.parameters())

    images = torch.rand(2, 3, 32, 32) * 2 - 1
    eps = torch.randn(2, *adapter.latent_shape(), generator=torch.Generator().manual_seed(3))
    image_to_image = StableDiffusionXLImg2ImgPipeline(**pipeline.components)
    expected = image_to_image.prepare_latents(
        images, None, 2, 1, torch.float32, CPU, torch.Generator().manual_seed(3), add_noise=False
    )
    torch.testing.assert_close(adapter.draw_latents(adapter.encode_images(images), eps), expected)


def test_student_is_the_teacher(sdxl_folder):
    settings = sdxl_settings(sdxl_folder)
    teacher, student = SDXL.teacher(settings), SDXL.student(settings)
    assert not any(p.requires_grad for p in teacher.network.parameters())
    assert all(p.requires_grad for p in student.network.parameters())
    assert len(student.blocks) == 9  # two down, the middle, two up, and their four attentions
    assert_same_weights(built(student), built(teacher))
    half = SDXL.student(sdxl_settings(sdxl_folder, compute_dtype=torch.bfloat16))
    assert {p.dtype for p in half.network.parameters()} == {torch.float32}


def test_anchors_are_whole_steps_without_a_shift(sdxl_folder):
    settings = sdxl_settings(sdxl_folder)
    anchors = SDXL.anchors(settings, TIMES)
    assert (anchors.times, anchors.end) == (TIMES, -1)
    assert SDXL.sampled_at(SDXL.path(settings), anchors) == TIMES
    with pytest.raises(ValueError, match=r"749.5.*whole steps"):
        SDXL.anchors(settings, (999.0, 749.5))
    with pytest.raises(ValueError, match=r"anchors.shift 3: SDXL's steps have no shift"):
        SDXL.anchors(sdxl_settings(sdxl_folder, shift=3.0), TIMES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(prediction_type="v_prediction"), 'is "v_prediction".* that predict epsilon'),
        (dict(prediction_type="sample"), "that predict epsilon"),
        (dict(rescale_betas_zero_snr=True), "ends at zero signal"),
        (dict(trained_betas=[0.5] * 1000), "ends at zero signal"),
        (dict(trained_betas=[0.001] * 10), "trained_betas holds 10 numbers, not 1000"),
        (dict(beta_schedule="squaredcos_cap_v2"), "squaredcos_cap_v2 is neither"),
        (dict(beta_start=None), "does not say beta_start"),  # .0001 or .00085, as its class has it
        (dict(num_train_timesteps=500), "1000 steps"),
        (dict(_class_name="EDMEulerScheduler", sigma_data=0.5), "EDMEulerScheduler, whose noise"),
        (dict(_class_name="FlowMatchEulerDiscreteScheduler"), "whose noise levels are not"),
        (dict(_class_name="UniPCMultistepScheduler", use_flow_sigmas=True), "use_flow_sigmas"),
        (dict(timestep_type="continuous"), "where SDXL is told a step"),
    ],
)
def test_schedules_that_cannot_be_distilled_are_refused(sdxl_folder, tmp_path, changes, message):
    file = "scheduler/scheduler_config.json"
    folder = changed_copy(sdxl_folder, tmp_path / "other", file, **changes)
    with pytest.raises(ValueError, match=message):
        SDXL.path(sdxl_settings(folder))


def refused(message: str, folder: Path, *args, **rest) -> None:
    with pytest.raises(ValueError, match=message):
        SDXL.require(sdxl_settings(folder, *args, **rest))


def test_settings_that_do_not_fit_are_refused(sdxl_folder, flux_folder, tmp_path):
    refused("no model_index.json", tmp_path)
    refused("holds a FluxPipeline", flux_folder)
    refused(r"\[32, 33\].*multiples of 2", sdxl_folder, (32, 33))
    refused("for FLUX alone", sdxl_folder, fold_guidance=3.5)
    refused("for FLUX alone", sdxl_folder, linked=tmp_path)
    with pytest.raises(ValueError, match="SDXL has no T5"):
        SDXL.require(settings_of(sdxl_folder, length=77))
    SDXL.require(sdxl_settings(sdxl_folder))
