"""The FLUX.2-klein adapter against Flux2KleinPipeline's own call, schedule and latents."""

import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import Flux2KleinPipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from flux2_pipeline import UNIT
from safetensors.torch import load_file, save_file
from teacher_parts import (
    CPU,
    Inputs,
    assert_same_weights,
    built,
    changed_copy,
    settings_of,
    spy_on_steps,
)
from text_parts import QWEN_LENGTH, QWEN_TURN, QWEN_WIDTH
from torch import nn

from senseflow.config.config import load_config
from senseflow.core.levels import SIGMAS
from senseflow.teachers.flux2.family import FLUX2
from senseflow.weights.lora import share
from senseflow.weights.lora_settings import LoraSettings
from senseflow.weights.meta import meta_network

LENGTH = 38
PROMPTS = ["a red seven", "two", "a blue one left of a very long line that is cut off"]
SCALE = 4.0
SIZES = [(32, 32), (20, 36)]
TOLERANCE = {  # of guidance, which the pipeline takes in its own type and we in float32
    torch.float32: dict(atol=1e-5, rtol=1e-4),
    torch.bfloat16: dict(atol=0.1, rtol=0.05),
}


def stock(folder: Path, dtype=torch.float32) -> Flux2KleinPipeline:
    pipeline = Flux2KleinPipeline.from_pretrained(folder, torch_dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def times(num: int) -> tuple[float, ...]:
    return tuple(1000 * (1 - step / num) for step in range(num))


def draw(pipeline: Flux2KleinPipeline, size, scale: float, **call):
    return pipeline(
        prompt=PROMPTS,
        height=size[0],
        width=size[1],
        guidance_scale=scale,
        max_sequence_length=LENGTH,
        generator=torch.Generator().manual_seed(0),
        **call,
    ).images


def seen_in_the_pipeline(folder, dtype, size, scale):
    """Per step of the pipeline's own call: the inputs and outputs of the transformer's forwards,
    with the prompts and, where the scale guides, without; and what its scheduler is given."""
    pipeline, seen = stock(folder, dtype), []
    guided = spy_on_steps(pipeline)

    def hook(module, args, kwargs, output):
        seen.append((dict(kwargs), output[0].clone()))

    pipeline.transformer.register_forward_hook(hook, with_kwargs=True)
    draw(pipeline, size, scale, num_inference_steps=4, output_type="latent")
    forwards = len(seen) // 4
    return [(*seen[i * forwards : (i + 1) * forwards], guided[i]) for i in range(4)]


def image(tokens: torch.Tensor, size) -> torch.Tensor:
    """(B, hw, C) as the pipeline has it to (B, C, h, w)."""
    rows, columns = size[0] // UNIT, size[1] // UNIT
    return tokens.float().permute(0, 2, 1).reshape(len(tokens), -1, rows, columns)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES)
def test_prediction_equals_the_pipelines_own_call_at_all_anchors(flux2_folder, dtype, size):
    """Prompts of mixed lengths, the null prompt, tokens, ids, time and guidance, in its type."""
    settings = settings_of(flux2_folder, size, LENGTH, compute_dtype=dtype)
    adapter, teacher = FLUX2.load_adapter(settings, CPU, built), built(FLUX2.teacher(settings))
    inputs = Inputs(teacher)
    cond = adapter.encode_prompts(PROMPTS)
    anchors = FLUX2.anchors(settings, times(4)).times
    steps = seen_in_the_pipeline(flux2_folder, dtype, size, SCALE)
    for tau, ((given, output), (null, uncond), guided) in zip(anchors, steps, strict=True):
        x_t, t = image(given["hidden_states"], size), torch.full((3,), tau)
        assert x_t.shape[1:] == adapter.latent_shape()
        with torch.no_grad():
            plain = adapter.predict(teacher, x_t, t, cond)
        received = inputs.latest
        assert set(received) == {*given} - {"guidance", "joint_attention_kwargs"}
        assert given["guidance"] is None and given["joint_attention_kwargs"] is None
        assert torch.equal(received["hidden_states"], given["hidden_states"])
        assert received["encoder_hidden_states"].dtype == dtype
        same_time = dict(rtol=2e-7, atol=0) if dtype == torch.float32 else dict(rtol=0, atol=0)
        torch.testing.assert_close(received["timestep"], given["timestep"], **same_time)
        for ids in ("img_ids", "txt_ids"):
            assert given[ids].shape[-1] == 4
            assert all(torch.equal(received[ids], sample) for sample in given[ids])
        torch.testing.assert_close(plain, image(output, size), **TOLERANCE[dtype])
        with torch.no_grad():
            v = adapter.predict_guided(teacher, x_t, t, cond, torch.full((3,), SCALE))
        expected = [image(half, size) for half in (uncond, output, guided)]
        exact = expected[0] + SCALE * (expected[1] - expected[0])
        torch.testing.assert_close(v, exact, **TOLERANCE[dtype])
        torch.testing.assert_close(v, expected[2], **TOLERANCE[dtype])
        both = inputs.latest["encoder_hidden_states"].float()
        for mine, theirs in zip(both.chunk(2), (null, given), strict=True):
            theirs = theirs["encoder_hidden_states"].float()
            torch.testing.assert_close(mine, theirs, **TOLERANCE[dtype])
    assert not torch.allclose(expected[0], expected[1], atol=1e-3)


def test_without_guidance_the_pipeline_predicts_once(flux2_folder):
    """At the number of the family's no_guidance, and there `guide` leaves the prompt's own."""
    steps = seen_in_the_pipeline(flux2_folder, torch.float32, SIZES[0], FLUX2.no_guidance)
    assert all(len(step) == 2 and torch.equal(step[0][1], step[1]) for step in steps)
    assert FLUX2.unguided == FLUX2.no_guidance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prompts_and_no_prompt_are_the_pipelines(flux2_folder, dtype):
    settings = settings_of(flux2_folder, length=LENGTH, compute_dtype=dtype)
    adapter, pipeline = FLUX2.load_adapter(settings, CPU, built), stock(flux2_folder, dtype)
    cond = adapter.encode_prompts(PROMPTS)
    for mine, prompts in ((cond, PROMPTS), (adapter.null(cond), [""] * 3)):
        assert mine.pooled is None and mine.mask is None
        assert mine.prompt_embeds.shape == (3, LENGTH, 3 * QWEN_WIDTH)
        with torch.no_grad():
            theirs, _ = pipeline.encode_prompt(prompts, max_sequence_length=LENGTH)
        assert mine.prompt_embeds.dtype == theirs.dtype == dtype
        close = dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(rtol=0, atol=0.1)
        torch.testing.assert_close(mine.prompt_embeds, theirs, **close)


def test_encoders_are_frozen_and_in_eval_mode(flux2_folder):
    adapter = FLUX2.load_adapter(settings_of(flux2_folder, length=LENGTH), CPU, built)
    parts = [p for p in adapter.pipeline.components.values() if isinstance(p, torch.nn.Module)]
    assert len(parts) == 2
    assert not any(part.training for part in parts)
    assert not any(p.requires_grad for part in parts for p in part.parameters())


@pytest.mark.parametrize("size", SIZES)
def test_images_are_encoded_as_the_pipeline_encodes_them(flux2_folder, size):
    """Patches, then the statistics; the mode, whatever the noise."""
    settings = settings_of(flux2_folder, size, LENGTH)
    adapter, pipeline = FLUX2.load_adapter(settings, CPU, built), stock(flux2_folder)
    images = torch.rand(2, 3, *size) * 2 - 1
    posterior = adapter.encode_images(images)
    assert posterior.mean.shape[1:] == FLUX2.posterior_shape(settings)
    z = adapter.draw_latents(posterior, torch.randn_like(posterior.std))
    with torch.no_grad():
        theirs = pipeline._encode_vae_image(images, generator=None)
    assert z.shape[1:] == adapter.latent_shape() == FLUX2.latent_shape(settings)
    torch.testing.assert_close(z, theirs, rtol=1e-5, atol=3e-5)  # another layout adds otherwise


@pytest.mark.parametrize("size", SIZES)
def test_latents_are_decoded_as_the_pipeline_decodes_them(flux2_folder, size):
    settings = settings_of(flux2_folder, size, LENGTH)
    adapter, pipeline = FLUX2.load_adapter(settings, CPU, built), stock(flux2_folder)
    z = torch.randn(3, *adapter.latent_shape()).requires_grad_()
    tokens = z.detach().flatten(2).transpose(1, 2)
    pipeline.scheduler.step = lambda prediction, t, latents, **_: (tokens,)
    theirs = draw(pipeline, size, 1.0, num_inference_steps=1, output_type="pt")
    ours = adapter.decode(z)
    torch.testing.assert_close((ours.detach() / 2 + 0.5).clamp(0, 1), theirs, rtol=1e-4, atol=1e-5)
    ours.sum().backward()
    assert z.grad.abs().sum() > 0
    assert all(p.grad is None for p in adapter.pipeline.vae.parameters())


# ------------------------------------------------------------------------------------- schedule


def own_sigmas(pipeline: Flux2KleinPipeline, size, num: int) -> list[float]:
    """What the pipeline's own call sets its scheduler to, before the first step."""
    embeds = torch.zeros(1, 1, 3 * QWEN_WIDTH)
    call = dict(height=size[0], width=size[1], num_inference_steps=num, guidance_scale=1.0)
    with pytest.raises(StopIteration):  # of `stop`, in the place of the first step
        pipeline(prompt_embeds=embeds, **call)
    return pipeline.scheduler.sigmas[:-1].tolist()


def stop(*_, **__):
    raise StopIteration


def test_anchors_are_the_pipelines_own_sigmas(flux2_folder):
    """Its mu depends on the tokens and on the steps; above 4,300 tokens on the tokens alone."""
    pipeline = stock(flux2_folder)
    pipeline.transformer.forward = stop
    for rows, columns in ((16, 16), (64, 64), (64, 68)):
        size = (UNIT * rows, UNIT * columns)
        settings = settings_of(flux2_folder, size, LENGTH)
        path = FLUX2.path(settings)
        for num in (1, 2, 4, 8):
            anchors = FLUX2.anchors(settings, times(num))
            expected = own_sigmas(pipeline, size, num)
            assert FLUX2.sampled_at(path, anchors) == pytest.approx(expected, rel=1e-6)
            assert anchors.end == path.clean
    default = FLUX2.default_anchors(flux2_folder, 4)
    assert default == pytest.approx(own_sigmas(pipeline, (None, None), 4), rel=1e-6)


@pytest.mark.parametrize(
    ("num", "expected"),
    [(4, [1, 0.9674, 0.9081, 0.7672]), (1, [1])],
)
def test_four_steps_at_1024_pixels(flux2_folder, num, expected):
    """64 x 64 tokens, as of the full-size VAE: the published pipeline's own numbers."""
    settings = settings_of(flux2_folder, (64 * UNIT, 64 * UNIT), LENGTH)
    on_the_card = FLUX2.sampled_at(FLUX2.path(settings), FLUX2.anchors(settings, times(num)))
    assert on_the_card == pytest.approx(expected, abs=5e-5)


def test_fewer_steps_are_anchors_and_twice_as_many_are_of_their_shift(flux2_folder):
    settings = settings_of(flux2_folder, (64 * UNIT, 64 * UNIT), LENGTH)
    anchors = list(FLUX2.sampled_at(FLUX2.path(settings), FLUX2.anchors(settings, times(4))))
    for steps in (1, 2):
        assert set(SIGMAS.of_steps(anchors, steps)) <= set(anchors)
    dense = SIGMAS.of_steps(anchors, 8)
    assert dense[::2] == anchors
    scheduler = stock(flux2_folder).scheduler
    scheduler.set_timesteps(
        sigmas=[1 - i / 8 for i in range(8)], mu=compute_empirical_mu(4096, num_steps=4)
    )
    assert dense == pytest.approx(scheduler.sigmas[:-1].tolist(), rel=1e-5)


def test_a_constant_shift_and_a_given_one(flux2_folder, tmp_path):
    """A folder that is not dynamic, and anchors.shift."""
    file = "scheduler/scheduler_config.json"
    folder = changed_copy(flux2_folder, tmp_path / "c", file, use_dynamic_shifting=False)
    for settings in (settings_of(folder), settings_of(flux2_folder, shift=3.0)):
        assert FLUX2.anchors(settings, times(4)).times == pytest.approx((1000, 900, 750, 500))
    assert FLUX2.default_anchors(folder, 4) == pytest.approx([1, 0.9, 0.75, 0.5])


# ------------------------------------------------------------------------------------ networks


def test_student_is_the_teacher(flux2_folder):
    settings = settings_of(flux2_folder, length=LENGTH)
    teacher, student = FLUX2.teacher(settings), FLUX2.student(settings)
    assert not any(p.requires_grad for p in teacher.network.parameters())
    assert all(p.requires_grad for p in student.network.parameters())
    assert len(student.blocks) == 2
    assert_same_weights(built(student), built(teacher))


NINE_B = dict(num_layers=8, num_single_layers=24, num_attention_heads=32, joint_attention_dim=12288)


@pytest.mark.parametrize(("changes", "billions"), [({}, 3.88), (NINE_B, 9.08)])
def test_the_published_sizes(changes, billions):
    config = FLUX2.published.denoiser | changes
    network = meta_network(getattr(diffusers, FLUX2.network_class), config)
    num = sum(p.numel() for p in network.parameters())
    assert round(num / 1e9, 2) == billions
    if not changes:
        assert num == FLUX2.published.num_parameters


# ------------------------------------------------------------------------------------ bad folders


def refused(message: str, folder: Path, *args, **rest) -> None:
    with pytest.raises(ValueError, match=message):
        FLUX2.require(settings_of(folder, *args, **rest))


def test_settings_that_do_not_fit_are_refused(flux2_folder, flux_folder, tmp_path):
    FLUX2.require(settings_of(flux2_folder, length=QWEN_LENGTH))
    refused("no model_index.json", tmp_path)
    refused("holds a FluxPipeline", flux_folder)
    dev = changed_copy(
        flux2_folder, tmp_path / "d", "model_index.json", _class_name="Flux2Pipeline"
    )
    refused("holds a Flux2Pipeline, this recipe distils a Flux2KleinPipeline", dev)
    refused(rf"\[32, 34\].*multiples of {UNIT}", flux2_folder, (32, 34))
    refused("max_sequence_length is missing", flux2_folder, length=None)
    refused(f"was made for {QWEN_LENGTH}", flux2_folder, length=QWEN_LENGTH + 1)
    refused("for FLUX alone", flux2_folder, fold_guidance=3.5)


def test_folders_that_lack_what_is_needed_are_named(flux2_folder, tmp_path):
    shutil.copytree(flux2_folder, tmp_path / "plain")
    (tmp_path / "plain/tokenizer/chat_template.jinja").unlink()
    refused("tokenizer has no chat template", tmp_path / "plain")
    file = "transformer/config.json"
    guided = changed_copy(flux2_folder, tmp_path / "guided", file, guidance_embeds=True)
    refused("guidance_embeds is true: .* FLUX.2-dev", guided)
    index = dict(text_encoder=[None, None], tokenizer=[None, None])
    bare = changed_copy(flux2_folder, tmp_path / "bare", "model_index.json", **index)
    refused("leaves out text_encoder, tokenizer, which is needed", bare)


def test_a_vae_without_running_statistics_is_named(flux2_folder, tmp_path):
    shutil.copytree(flux2_folder, tmp_path / "teacher")
    file = tmp_path / "teacher/vae/diffusion_pytorch_model.safetensors"
    state = {k: v for k, v in load_file(file).items() if "running" not in k}
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"2 missing \(bn.running_mean, bn.running_var\)"):
        FLUX2.vae(settings_of(tmp_path / "teacher", length=LENGTH))


def test_a_distilled_folder_is_named_and_not_guided(flux2_folder, tmp_path):
    """As in its pipeline, which ignores the scale."""
    distilled = changed_copy(flux2_folder, tmp_path / "d", "model_index.json", is_distilled=True)
    assert FLUX2.cautions(flux2_folder) == []
    (line,) = FLUX2.cautions(distilled)
    assert "is distilled already" in line and "dmd.guidance" in line
    steps = seen_in_the_pipeline(distilled, torch.float32, SIZES[0], SCALE)
    settings = settings_of(distilled, SIZES[0], LENGTH)
    adapter, teacher = FLUX2.load_adapter(settings, CPU, built), built(FLUX2.teacher(settings))
    (given, _), guided = steps[1]
    tau = torch.full((3,), FLUX2.anchors(settings, times(4)).times[1])
    x_t, cond = image(given["hidden_states"], SIZES[0]), adapter.encode_prompts(PROMPTS)
    with torch.no_grad():
        v = adapter.predict_guided(teacher, x_t, tau, cond, torch.full((3,), SCALE))
    torch.testing.assert_close(v, image(guided, SIZES[0]), atol=1e-5, rtol=1e-4)


def test_prompts_longer_than_the_limit_are_those_that_the_template_makes_so(flux2_folder):
    pipeline = stock(flux2_folder)
    texts = FLUX2.chat.worded(pipeline.tokenizer, PROMPTS)
    lengths = [len(ids) for ids in pipeline.tokenizer(texts)["input_ids"]]
    assert lengths == [QWEN_TURN + len(prompt) for prompt in PROMPTS]
    assert [length > LENGTH for length in lengths] == [False, False, True]
    assert json.loads((flux2_folder / "model_index.json").read_text())["is_distilled"] is False


@pytest.mark.parametrize("name", ["lora", "24gb"])
def test_the_lora_recipes_adapt_every_layer_of_the_blocks(flux2_folder, name):
    """Also where one block has a list of layers by the name that a layer has in another."""
    targets = load_config(f"configs/FLUX2/flux2_klein_senseflow_{name}.yaml").lora.targets
    source, base = share(
        FLUX2.teacher(settings_of(flux2_folder)), LoraSettings(4, 4.0, "B", targets, 0, "bfloat16")
    )
    blocks = {
        name: block
        for name, block in source.network.named_modules()
        if any(block is repeated for repeated in source.repeated)
    }
    layers = {
        name.removesuffix(".base_layer")
        for name, module in source.network.named_modules()
        if type(module) is nn.Linear and name.startswith(tuple(blocks))
    }
    adapted = {name for name in layers if ".lora_" not in name}
    assert len(blocks) > 1 and set(base.layers) == adapted
