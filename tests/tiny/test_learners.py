"""Teachers learn in exactly the setting in which their stock pipelines then call them."""

from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, Flux2KleinPipeline, QwenImagePipeline
from torch import nn

from senseflow.config import families
from senseflow.teachers.flux2.adapter import normalised
from senseflow.teachers.qwen_image.adapter import pack
from senseflow.tiny import flux, flux2, qwen_image, sd35, sdxl, z_image
from senseflow.tiny.families import FAMILIES, Method, family_of
from senseflow.tiny.fitting import fit
from senseflow.tiny.lesson import Lesson, flow_at, teach, without_dropped
from senseflow.tiny.vae import new_vae

PROMPTS = ["a red seven left of a blue two on white", "a cyan one above a green six on pink"]
NEW = {
    "flux": flux.FluxLearner,
    "sd35_medium": partial(sd35.SD35Learner, "sd35_medium"),
    "sd35_large": partial(sd35.SD35Learner, "sd35_large"),
    "sdxl": sdxl.SDXLLearner,
    "flux2_klein": flux2.Flux2Learner,
    "z_image": z_image.ZImageLearner,
    "qwen_image": qwen_image.QwenImageLearner,
}
VAES = {"flux2_klein": flux2.new_flux2_vae, "qwen_image": qwen_image.new_qwen_vae}


def pipeline_of(name: str, folder: Path) -> tuple[nn.Module, object]:
    """A learner whose every weight matters, and its pipeline as `from_pretrained` gives it."""
    torch.manual_seed(0)
    learner = NEW[name]().eval().requires_grad_(False)
    for parameter in learner.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    vae = VAES.get(name, new_vae)().eval()
    learner.pipeline(vae).save_pretrained(folder)
    pipeline = family_of(folder).pipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return learner, pipeline


def one_step(pipeline, latents: torch.Tensor, **prompt) -> torch.Tensor:
    """The pipeline's x_0 (B, C, h, w) of one step from noise, without guidance."""
    family = FAMILIES[type(pipeline).__name__]
    method = Method("teacher", 1, family.teacher_samplers[-1])
    pipeline.scheduler = family.scheduler(pipeline.scheduler.config, method)
    is_flux = isinstance(pipeline, flux.FluxPipeline)
    is_qwen = isinstance(pipeline, QwenImagePipeline)
    teacher = next(f for f in families.FAMILIES if f.pipeline_class == type(pipeline).__name__)
    output = pipeline(
        **teacher.guided(1.0 if is_flux else teacher.no_guidance, len(latents)),
        height=32,
        width=32,
        latents=flux.pack(latents) if is_flux else pack(latents) if is_qwen else latents,
        output_type="latent",
        **family.steps(1),
        **prompt,
    ).images
    if isinstance(pipeline, Flux2KleinPipeline):
        return normalised(pipeline.vae, output)  # which its call has undone
    if is_qwen:  # a video of one frame
        return pipeline._unpack_latents(output, 32, 32, 4)[:, :, 0]
    return pipeline._unpack_latents(output, 32, 32, 4) if is_flux else output


def loss_at_noise(
    learner, pipeline, latents: torch.Tensor, x_0: torch.Tensor, prompts: list[str], dropped: bool
) -> float:
    """The learner's loss where x_t is `latents` and the pipeline's prediction is x_0."""
    eps, u = latents, torch.ones(len(latents))
    if isinstance(pipeline.scheduler, DDIMScheduler):
        u = u - 1e-4
        alpha, sigma = (s.sqrt() for s in (learner.abar[-1], 1 - learner.abar[-1]))
        eps = (latents - alpha * x_0) / sigma
    drop = torch.full((len(latents),), dropped)
    return learner.loss(x_0, eps, u, learner.text.tokenize(prompts), drop).item()


@pytest.mark.parametrize("name", NEW)
def test_the_loss_is_zero_at_what_the_pipeline_predicts(name, tmp_path):
    learner, pipeline = pipeline_of(name, tmp_path)
    shape = flux2.LATENT_SHAPE if name == "flux2_klein" else (8, 8, 8)
    latents = torch.randn(2, *shape)
    measure = partial(loss_at_noise, learner, pipeline, latents)

    # ZImagePipeline writes its template into the list that it is given.
    x_0 = one_step(pipeline, latents, prompt=list(PROMPTS))
    assert measure(x_0, PROMPTS, dropped=False) < 1e-9
    assert measure(x_0, PROMPTS[::-1], dropped=False) > 1e-3

    if name == "sdxl":  # as StableDiffusionXLPipeline makes its own null prompt
        embeds, _, pooled, _ = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
        null = {
            "prompt_embeds": torch.zeros_like(embeds),
            "pooled_prompt_embeds": torch.zeros_like(pooled),
        }
    else:
        null = {"prompt": [" ", " "] if name == "qwen_image" else ["", ""]}
    x_0 = one_step(pipeline, latents, **null)
    assert measure(x_0, PROMPTS, dropped=True) < 1e-9
    assert measure(x_0, PROMPTS, dropped=False) > 1e-3


def test_dropped_samples_get_the_empty_caption():
    ids, empty = [torch.tensor([[1, 2], [3, 4]])], [torch.tensor([[8, 9]])]
    (replaced,) = without_dropped(ids, empty, torch.tensor([False, True]))
    assert replaced.tolist() == [[1, 2], [8, 9]]


def test_times_reach_from_clean_to_noise():
    x_0, eps = torch.zeros(3, 1, 1, 1), torch.full((3, 1, 1, 1), 2.0)
    sigma, x_t = flow_at(x_0, eps, torch.tensor([0.0, 0.5, 1.0]))
    torch.testing.assert_close(sigma, torch.tensor([0.0, 0.9 / 1.4, 1.0]))
    torch.testing.assert_close(x_t.flatten(), 2 * sigma)


def test_teaching_is_repeatable_and_lowers_the_loss():
    lesson = Lesson(12, 2e-3, num_pictures=50, dark_weight=2, seed=0, batch_size=16)
    vae = new_vae().eval()
    vae.register_to_config(scaling_factor=0.5, shift_factor=0.1)
    losses = []
    for iterations in (12, 12, 1):
        torch.manual_seed(0)
        learner, figures = teach(
            vae, flux.FluxLearner(), Lesson(**{**vars(lesson), "iterations": iterations})
        )
        losses.append(figures["loss"])
    assert losses[0] == losses[1] < losses[2]
    assert not learner.training


def test_distilled_guidance_moves_the_network_alone():
    torch.manual_seed(0)
    vae, learner = new_vae().eval(), flux.FluxLearner()
    before = {key: value.clone() for key, value in learner.state_dict().items()}
    lesson = Lesson(3, 1e-3, num_pictures=20, dark_weight=1, seed=0, batch_size=4)
    distilled, _ = flux.distil_guidance(vae, learner, lesson)
    moved = {k for k, v in distilled.state_dict().items() if not torch.equal(v, before[k])}
    assert moved and all(key.startswith("network.") for key in moved)
    assert any("guidance_embedder" in key for key in moved)
    assert all(torch.equal(v, before[k]) for k, v in learner.state_dict().items())


def test_fit_stops_at_a_loss_that_is_not_finite():
    network = nn.Linear(1, 1)
    with pytest.raises(RuntimeError, match="non-finite"):
        fit(lambda _: network.weight.sum() * float("nan"), [network], 2, 1e-3, "nan")
