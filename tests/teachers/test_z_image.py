"""The Z-Image adapter against ZImagePipeline's own call, schedule and encodings."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline
from teacher_parts import (
    CPU,
    Inputs,
    assert_same_weights,
    built,
    changed_copy,
    check_batch_independence,
    settings_of,
    spy_on_steps,
)
from z_image_pipeline import MAX_SIDE, SHIFT, UNIT

from senseflow.core.levels import even_times, one_shift
from senseflow.teachers.encoded import Conditioning
from senseflow.teachers.z_image.family import Z_IMAGE

LENGTH = 40
PROMPTS = ["a red seven", "two", "two blue ones on a wide white page"]  # padded to 32, 32, 64
NUM = len(PROMPTS)
TIMES = (1000.0, 750.0, 500.0, 250.0)
SCALE = 4.0
TOLERANCE = {
    torch.float32: dict(atol=2e-5, rtol=1e-4),
    torch.bfloat16: dict(atol=0.15, rtol=0.05),
}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def stock(folder, dtype=torch.float32) -> ZImagePipeline:
    pipeline = ZImagePipeline.from_pretrained(folder, torch_dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def call(pipeline, size, num=4, guidance=SCALE, prompts=PROMPTS):
    return pipeline(
        [*prompts],  # it writes into the list
        height=size[0],
        width=size[1],
        num_inference_steps=num,
        guidance_scale=guidance,
        max_sequence_length=LENGTH,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
    )


def seen_in_the_pipeline(folder, dtype, size, guidance):
    """Per step of the pipeline's own call: what the transformer is given (images, time, prompts),
    and the prediction that the scheduler is given."""
    pipeline, seen = stock(folder, dtype), []
    predictions = spy_on_steps(pipeline)

    def hook(module, args, kwargs):
        seen.append(args)

    pipeline.transformer.register_forward_pre_hook(hook, with_kwargs=True)
    call(pipeline, size, guidance=guidance)
    return list(zip(seen, predictions, strict=True))


def opened(folder, size=(32, 32), dtype=torch.float32):
    settings = settings_of(folder, size, LENGTH, compute_dtype=dtype)
    return settings, Z_IMAGE.load_adapter(settings, CPU, built)


@DTYPES
@pytest.mark.parametrize("size", [(32, 32), (20, 36)])
def test_guided_prediction_equals_the_pipelines_own_call_at_all_anchors(
    z_image_folder, size, dtype
):
    """Prompts and no prompt in lists, time, sign and guidance; both halves in one forward."""
    settings, adapter = opened(z_image_folder, size, dtype)
    teacher = built(Z_IMAGE.teacher(settings))
    inputs = Inputs(teacher, ("x", "t", "cap_feats"))
    cond = adapter.encode_prompts(PROMPTS)
    anchors = Z_IMAGE.anchors(settings, TIMES).times
    seen = seen_in_the_pipeline(z_image_folder, dtype, size, SCALE)
    assert len(seen) == 4
    for tau, ((images, time, prompts), prediction) in zip(anchors, seen, strict=True):
        x_t = torch.stack(images[:NUM])[:, :, 0].float()
        assert x_t.shape[1:] == adapter.latent_shape()
        with torch.no_grad():
            v = adapter.predict_guided(
                teacher, x_t, torch.full((NUM,), tau), cond, torch.full((NUM,), SCALE)
            )
        received = inputs.latest
        assert torch.equal(received["t"], time) and received["t"].dtype == torch.float32
        # no prompt goes first here, and behind there
        theirs = [*prompts[NUM:], *prompts[:NUM]]
        assert [len(p) for p in received["cap_feats"]] == [len(p) for p in theirs]
        assert len({len(p) for p in theirs}) == NUM + 1
        for mine, other in zip(received["cap_feats"], theirs, strict=True):
            torch.testing.assert_close(mine, other, **TOLERANCE[dtype])
        assert all(torch.equal(*pair) for pair in zip(received["x"], images, strict=True))
        torch.testing.assert_close(v, prediction, **TOLERANCE[dtype])


@DTYPES
def test_prediction_equals_the_pipelines_own_call_without_guidance(z_image_folder, dtype):
    settings, adapter = opened(z_image_folder, dtype=dtype)
    network = built(Z_IMAGE.teacher(settings))
    cond = adapter.encode_prompts(PROMPTS)
    anchors = Z_IMAGE.anchors(settings, TIMES).times
    seen = seen_in_the_pipeline(z_image_folder, dtype, (32, 32), 0)
    for tau, ((images, _, _), prediction) in zip(anchors, seen, strict=True):
        x_t, t = torch.stack(images)[:, :, 0].float(), torch.full((NUM,), tau)
        with torch.no_grad():
            torch.testing.assert_close(
                adapter.predict(network, x_t, t, cond), prediction, **TOLERANCE[dtype]
            )


def test_guidance_counts_from_0(z_image_folder):
    """At 0 it is off; else cond + w (cond - uncond), in the pipeline's own arithmetic."""
    _, adapter = opened(z_image_folder)
    uncond, cond = torch.randn(2, NUM, 4, 16, 16)
    assert torch.equal(adapter.guide(uncond, cond, torch.zeros(NUM)), cond)
    scale = torch.tensor([1.0, 4.0, 0.5])
    expected = torch.stack(
        [c + w * (c - u) for u, c, w in zip(uncond, cond, scale.tolist(), strict=True)]
    )
    assert torch.equal(adapter.guide(uncond, cond, scale), expected)
    assert Z_IMAGE.unguided == Z_IMAGE.no_guidance == 0


@DTYPES
def test_prompts_and_no_prompt_are_the_pipelines(z_image_folder, dtype):
    _, adapter = opened(z_image_folder, dtype=dtype)
    with torch.no_grad():
        theirs, none = stock(z_image_folder, dtype).encode_prompt(
            [*PROMPTS], max_sequence_length=LENGTH
        )
    cond = adapter.encode_prompts(PROMPTS)
    null = adapter.null(cond)
    for mine, expected in ((cond, theirs), (null, none)):
        assert mine.prompt_embeds.shape[:2] == mine.mask.shape == (NUM, LENGTH)
        assert mine.prompt_embeds.dtype == dtype and mine.pooled is None
        assert mine.lengths == [len(row) for row in expected]
        for row, length, other in zip(mine.prompt_embeds, mine.lengths, expected, strict=True):
            torch.testing.assert_close(row[:length], other, **TOLERANCE[dtype])
    assert len(set(cond.lengths)) == NUM and max(cond.lengths) == LENGTH


def test_padding_on_the_left_is_no_other_prompt(z_image_folder, tmp_path):
    file = "tokenizer/tokenizer_config.json"
    folder = changed_copy(z_image_folder, tmp_path / "left", file, padding_side="left")
    pipeline = stock(folder)
    assert pipeline.tokenizer.padding_side == "left"
    with torch.no_grad():
        theirs, _ = pipeline.encode_prompt([*PROMPTS], max_sequence_length=LENGTH)
    cond = opened(folder)[1].encode_prompts(PROMPTS)
    for row, length, other in zip(cond.prompt_embeds, cond.lengths, theirs, strict=True):
        torch.testing.assert_close(row[:length], other, **TOLERANCE[torch.float32])


def test_a_sample_does_not_depend_on_its_batch(z_image_folder):
    settings, adapter = opened(z_image_folder)
    network = built(Z_IMAGE.student(settings))
    check_batch_independence(adapter, network, PROMPTS, **TOLERANCE[torch.float32])


def test_no_number_is_asked_of_a_device(z_image_folder):
    """Meta tensors have none: lengths are those of the mask, which lies on the host."""
    settings, adapter = opened(z_image_folder)
    network = Z_IMAGE.student(settings).network
    inputs = Inputs(network, ("x", "t", "cap_feats"))
    embeds = torch.empty(NUM, LENGTH, 16, device="meta")
    x_t, t = torch.empty(NUM, *adapter.latent_shape(), device="meta"), torch.ones(NUM)
    mask = adapter.encode_prompts(PROMPTS).mask
    for given, expected in ((mask, mask.sum(1).tolist()), (mask.to("meta"), [LENGTH] * NUM)):
        v = adapter.predict(network, x_t, t.to("meta"), Conditioning(embeds, mask=given))
        assert v.is_meta and v.shape == x_t.shape
        assert [len(prompt) for prompt in inputs.latest["cap_feats"]] == expected


@pytest.mark.parametrize("size", [(16, 16), (32, 20), (48, 48)])
def test_anchors_are_the_pipelines_own_sigmas(z_image_folder, size):
    """At every size and number of steps: the shift is constant, whatever mu the pipeline makes."""
    settings, pipeline = settings_of(z_image_folder, size), stock(z_image_folder)
    for num in (1, 2, 4, 8):
        call(pipeline, size, num, guidance=0, prompts=["a"])
        sigmas = pipeline.scheduler.sigmas[:-1].tolist()
        anchors = Z_IMAGE.anchors(settings, tuple(1000 * u for u in even_times(num)))
        path = Z_IMAGE.path(settings)
        assert anchors.times[0] == 1000 and anchors.end == path.clean
        assert Z_IMAGE.sampled_at(path, anchors) == pytest.approx(sigmas, rel=1e-6)
        assert Z_IMAGE.default_anchors(z_image_folder, num) == pytest.approx(sigmas, rel=1e-6)
    assert Z_IMAGE.default_anchors(z_image_folder, 4) == pytest.approx(
        [1, 18 / 19, 6 / 7, 2 / 3]  # 6 u / (1 + 5 u)
    )


def test_fewer_and_more_steps_of_a_student(z_image_folder):
    """Fewer are among its anchors; 8 go through the shift of its 4."""
    anchors = Z_IMAGE.default_anchors(z_image_folder, 4)
    for num in (1, 2):
        chosen = Z_IMAGE.levels.of_steps(anchors, num)
        assert len(chosen) == num and set(chosen) <= set(anchors)
    dense = Z_IMAGE.levels.of_steps(anchors, 8)
    assert set(anchors) <= set(dense)
    assert dense == pytest.approx(Z_IMAGE.default_anchors(z_image_folder, 8))
    assert one_shift(dense) == pytest.approx(SHIFT)


def test_another_shift_of_the_folder_and_of_a_run(z_image_folder, tmp_path):
    folder = with_scheduler(z_image_folder, tmp_path / "other", shift=3.0)
    assert Z_IMAGE.default_anchors(folder, 4) == pytest.approx([1, 0.9, 0.75, 0.5])
    for settings in (settings_of(folder), settings_of(z_image_folder, shift=3.0)):
        path = Z_IMAGE.path(settings)
        anchors = Z_IMAGE.anchors(settings, TIMES)
        assert Z_IMAGE.sampled_at(path, anchors) == pytest.approx((1, 0.9, 0.75, 0.5))


def with_scheduler(folder, target, **config) -> Path:
    return changed_copy(folder, target, "scheduler/scheduler_config.json", **config)


@pytest.mark.parametrize("num", [1, 2, 4, 8])
def test_a_plain_pipeline_draws_at_a_students_anchors(z_image_folder, num):
    """By the number of steps, to the bit as our own script rounds them."""
    anchors = tuple(Z_IMAGE.default_anchors(z_image_folder, num))
    given = Z_IMAGE.stock_sampling(anchors)
    assert given.levels == {"num_inference_steps": num} and given.guidance == 0
    pipeline = stock(z_image_folder)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(**given.changes)
    call(pipeline, (16, 16), num, guidance=given.guidance, prompts=["a"])
    rounded = torch.tensor(Z_IMAGE.rounded(anchors, list(anchors)))
    assert torch.equal(pipeline.scheduler.sigmas[:-1], rounded)
    odd = (1.0, 0.9, 0.7, 0.5)
    assert Z_IMAGE.stock_sampling(odd).levels == {"sigmas": list(odd)}
    assert Z_IMAGE.rounded(odd, list(odd)) == list(odd)


def test_vae_both_ways_as_the_pipeline_scales_it(z_image_folder):
    _, adapter = opened(z_image_folder)
    vae, z = adapter.pipeline.vae, torch.randn(2, *adapter.latent_shape()).requires_grad_()
    pipeline = stock(z_image_folder)
    pipeline.scheduler.step = lambda prediction, t, latents, **_: (z.detach(),)
    theirs = pipeline(["a", "b"], height=32, width=32, num_inference_steps=1, output_type="pt")
    ours = adapter.decode(z)
    torch.testing.assert_close((ours.detach() / 2 + 0.5).clamp(0, 1), theirs.images)
    ours.sum().backward()
    assert z.grad.abs().sum() > 0 and all(p.grad is None for p in vae.parameters())

    images, eps = torch.rand(2, 3, 32, 32) * 2 - 1, torch.randn(2, *adapter.latent_shape())
    posterior = vae.encode(images).latent_dist
    expected = (posterior.mean + posterior.std * eps - 0.1159) * 0.3611
    torch.testing.assert_close(adapter.draw_latents(adapter.encode_images(images), eps), expected)


def test_student_is_the_teacher(z_image_folder):
    settings = settings_of(z_image_folder, compute_dtype=torch.bfloat16)
    teacher, student = Z_IMAGE.teacher(settings), Z_IMAGE.student(settings)
    assert len(student.blocks) == len(student.repeated) == 4  # both refiners and two layers
    state = {(p.dtype, p.requires_grad) for p in teacher.network.parameters()}
    assert state == {(torch.bfloat16, False)}
    assert {(p.dtype, p.requires_grad) for p in student.network.parameters()} == {
        (torch.float32, True)
    }
    teacher = Z_IMAGE.teacher(replace(settings, compute_dtype=torch.float32))
    assert_same_weights(built(student), built(teacher))


def refused(message: str, folder: Path, *args, **rest) -> None:
    with pytest.raises(ValueError, match=message):
        Z_IMAGE.require(settings_of(folder, *args, **rest))


def test_settings_that_do_not_fit_are_refused(z_image_folder, flux_folder, tmp_path):
    Z_IMAGE.require(settings_of(z_image_folder, (MAX_SIDE, 20), LENGTH))
    refused("no model_index.json", tmp_path)
    refused("holds a FluxPipeline, this recipe distils a ZImagePipeline", flux_folder)
    refused(rf"\[32, 34\].*multiples of {UNIT}", z_image_folder, (32, 34))
    refused(f"ends at {MAX_SIDE} pixels", z_image_folder, (MAX_SIDE + UNIT, 32))
    refused("max_sequence_length is missing", z_image_folder, length=None)
    refused("for FLUX alone", z_image_folder, length=LENGTH, guidance=3.5)


def test_a_prompt_longer_than_the_table_of_positions_is_refused(z_image_folder, tmp_path):
    """Image tokens stand one place behind the padded prompt: 64 + 1 of 96, and 96 + 1 not."""
    file = "tokenizer/tokenizer_config.json"
    folder = changed_copy(z_image_folder, tmp_path / "long", file, model_max_length=1000)
    refused("max_sequence_length 65: Z-Image takes 64 tokens of a prompt", folder, length=65)
    settings = settings_of(folder, (16, 16), 64)
    Z_IMAGE.require(settings)
    adapter = Z_IMAGE.load_adapter(settings, CPU, built)
    cond = adapter.encode_prompts(["a long prompt " * 9])
    assert cond.lengths == [64]
    network = built(Z_IMAGE.student(settings))
    with torch.no_grad():
        adapter.predict(network, torch.zeros(1, 4, 8, 8), torch.tensor([500.0]), cond)


def test_neighbouring_teachers_are_named(z_image_folder, tmp_path):
    omni = {"_class_name": "ZImageOmniPipeline"}
    folder = changed_copy(z_image_folder, tmp_path / "omni", "model_index.json", **omni)
    refused("holds a ZImageOmniPipeline, this recipe distils a ZImagePipeline", folder)
    config = "transformer/config.json"
    folder = changed_copy(z_image_folder, tmp_path / "siglip", config, siglip_feat_dim=8)
    refused("siglip_feat_dim is 8: it is Z-Image Omni's", folder)
    folder = with_scheduler(z_image_folder, tmp_path / "dynamic", use_dynamic_shifting=True)
    refused("one shift, not a dynamic one", folder)


def test_a_tokenizer_without_its_template_is_named(z_image_folder, tmp_path):
    folder = Path(shutil.copytree(z_image_folder, tmp_path / "plain"))
    (folder / "tokenizer" / "chat_template.jinja").unlink()
    refused("tokenizer has no chat template", folder, length=LENGTH)


def test_an_encoder_of_another_kind_is_named(z_image_folder, tmp_path):
    index = json.loads((z_image_folder / "model_index.json").read_text())
    index["text_encoder"] = ["transformers", "T5EncoderModel"]
    folder = changed_copy(z_image_folder, tmp_path / "t5", "model_index.json", **index)
    with pytest.raises(ValueError, match="holds a T5EncoderModel, not one of Qwen3"):
        Z_IMAGE.load_adapter(settings_of(folder, length=LENGTH), CPU, built)


def test_z_image_turbo_is_named_before_it_is_distilled(z_image_folder, tmp_path):
    """A teacher of 8 steps without guidance, told by its name or its scheduler's shift."""
    assert Z_IMAGE.cautions(z_image_folder) == []
    by_shift = with_scheduler(z_image_folder, tmp_path / "copy", shift=3.0)
    by_name = Path(shutil.copytree(z_image_folder, tmp_path / "Z-Image-Turbo"))
    for folder, told in ((by_shift, "its scheduler's shift 3"), (by_name, "its name")):
        (said,) = Z_IMAGE.cautions(folder)
        assert said.startswith(f"{folder} is Z-Image-Turbo, by {told}: distilled to 8 steps")
