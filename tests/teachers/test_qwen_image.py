"""The Qwen-Image adapter against QwenImagePipeline's own call, encodings and VAE."""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
)
from qwen_image_pipeline import MEAN, STD, TURN, UNIT
from safetensors.torch import load_file, save_file
from teacher_parts import (
    CPU,
    Inputs,
    assert_same_weights,
    built,
    changed_copy,
    check_batch_independence,
    settings_of,
    sharded,
    spy_on_steps,
)
from torch.distributed.tensor import DTensor
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLDecoderLayer

from senseflow.core.levels import even_times
from senseflow.sampling import load_teacher
from senseflow.teachers.chat import num_tokens
from senseflow.teachers.encoded import Conditioning
from senseflow.teachers.family import Plan
from senseflow.teachers.qwen_image.adapter import QWEN2_5_VL
from senseflow.teachers.qwen_image.adapter import tokenizer as for_plans
from senseflow.teachers.qwen_image.family import QWEN_IMAGE, shift_of
from senseflow.teachers.qwen_image.latents import require_statistics
from senseflow.teachers.qwen_image.prompts import CHAT
from senseflow.teachers.text_encoders import text_encoder

LENGTH = 20
PROMPTS = ["a red seven", "two", "two blue ones on a wide white page"]  # the last of which is cut
NUM = len(PROMPTS)
TIMES = (1000.0, 750.0, 500.0, 250.0)
FOUR = [1, 0.9, 0.75, 0.5]
SCALE = 4.0
TOLERANCE = {
    torch.float32: dict(atol=2e-5, rtol=1e-4),
    torch.bfloat16: dict(atol=0.15, rtol=0.05),
}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def stock(folder, dtype=torch.float32) -> QwenImagePipeline:
    pipeline = QwenImagePipeline.from_pretrained(folder, torch_dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def call(pipeline, size, num=4, guidance=SCALE, prompts=PROMPTS, **rest):
    return pipeline(
        prompts,
        negative_prompt=[" "] * len(prompts) if guidance > 1 else None,
        height=size[0],
        width=size[1],
        num_inference_steps=num,
        true_cfg_scale=guidance,
        max_sequence_length=LENGTH,
        generator=torch.Generator().manual_seed(0),
        **{"output_type": "latent", **rest},
    ).images


def seen_in_the_pipeline(folder, dtype, size, guidance, prompts=PROMPTS):
    """Per step of the pipeline's own call at a student's sigmas: what the transformer is given,
    once or twice, and the prediction that the scheduler is given."""
    pipeline, seen = stock(folder, dtype), []
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    predictions = spy_on_steps(pipeline)
    pipeline.transformer.register_forward_pre_hook(
        lambda module, args, given: seen.append(given), with_kwargs=True
    )
    call(pipeline, size, guidance=guidance, prompts=prompts, sigmas=FOUR)
    per = 2 if guidance > 1 else 1
    assert len(seen) == 4 * per
    return list(zip(seen[::per], seen[per - 1 :: per], predictions, strict=True))


def unpacked(tokens, size):
    """By the pipeline's own function, without its axis of frames."""
    return QwenImagePipeline._unpack_latents(tokens, *size, 2)[:, :, 0].float()


def opened(folder, size=(32, 32), dtype=torch.float32):
    settings = settings_of(folder, size, LENGTH, compute_dtype=dtype)
    return settings, QWEN_IMAGE.load_adapter(settings, CPU, built)


@DTYPES
@pytest.mark.parametrize("size", [(32, 32), (20, 36)])
def test_guided_prediction_equals_the_pipelines_own_call_at_all_anchors(
    qwen_image_folder, size, dtype
):
    """Prompts of mixed lengths and no prompt in one forward, with a mask, guidance and rescale."""
    settings, adapter = opened(qwen_image_folder, size, dtype)
    teacher = built(QWEN_IMAGE.teacher(settings))
    inputs = Inputs(teacher)
    cond = adapter.encode_prompts(PROMPTS)
    anchors = QWEN_IMAGE.anchors(settings, TIMES).times
    seen = seen_in_the_pipeline(qwen_image_folder, dtype, size, SCALE)
    for tau, (given, none, prediction) in zip(anchors, seen, strict=True):
        x_t = unpacked(given["hidden_states"], size)
        assert x_t.shape[1:] == adapter.latent_shape()
        with torch.no_grad():
            v = adapter.predict_guided(
                teacher, x_t, torch.full((NUM,), tau), cond, torch.full((NUM,), SCALE)
            )
        mine = inputs.latest
        assert torch.equal(mine["hidden_states"], given["hidden_states"].repeat(2, 1, 1))
        assert torch.equal(mine["timestep"], given["timestep"].repeat(2))
        assert mine["img_shapes"] == given["img_shapes"] * 2
        masks = mine["encoder_hidden_states_mask"]
        assert torch.equal(masks[NUM:], given["encoder_hidden_states_mask"].bool())
        num = none["encoder_hidden_states"].shape[1]  # of no prompt, which is not padded there
        assert none["encoder_hidden_states_mask"] is None
        assert masks[:NUM].sum(1).tolist() == [num] * NUM
        torch.testing.assert_close(v, unpacked(prediction, size), **TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize("prompts", [PROMPTS, ["two", "one"]])
def test_prediction_equals_the_pipelines_own_call_without_guidance(
    qwen_image_folder, dtype, prompts
):
    """Without a mask where all prompts are of one length."""
    settings, adapter = opened(qwen_image_folder, dtype=dtype)
    network = built(QWEN_IMAGE.teacher(settings))
    inputs, cond = Inputs(network), adapter.encode_prompts(prompts)
    anchors = QWEN_IMAGE.anchors(settings, TIMES).times
    seen = seen_in_the_pipeline(qwen_image_folder, dtype, (32, 32), 1, prompts)
    for tau, (given, _, prediction) in zip(anchors, seen, strict=True):
        x_t, t = unpacked(given["hidden_states"], (32, 32)), torch.full((len(prompts),), tau)
        with torch.no_grad():
            v = adapter.predict(network, x_t, t, cond)
        torch.testing.assert_close(v, unpacked(prediction, (32, 32)), **TOLERANCE[dtype])
        theirs, mine = (x["encoder_hidden_states_mask"] for x in (given, inputs.latest))
        assert (mine is None) == (theirs is None) == (prompts != PROMPTS)
        shapes = [x["encoder_hidden_states"].shape for x in (given, inputs.latest)]
        assert shapes[0] == shapes[1]


def test_every_token_is_as_long_as_without_guidance(qwen_image_folder):
    """By the pipeline's own packing; its direction is that of plain guidance."""
    _, adapter = opened(qwen_image_folder)
    uncond, cond = torch.randn(2, NUM, *adapter.latent_shape())
    scale = torch.tensor([1.0, 4.0, 7.5])

    def pack(x):
        return QwenImagePipeline._pack_latents(x, NUM, *adapter.latent_shape())

    guided = pack(adapter.guide(uncond, cond, scale))
    torch.testing.assert_close(guided.norm(dim=-1), pack(cond).norm(dim=-1))
    plain = pack(uncond + scale.view(-1, 1, 1, 1) * (cond - uncond))
    cosine = torch.nn.functional.cosine_similarity(guided, plain, dim=-1)
    torch.testing.assert_close(cosine, torch.ones_like(cosine))
    torch.testing.assert_close(guided[0], pack(cond)[0])
    assert QWEN_IMAGE.unguided == QWEN_IMAGE.no_guidance == 1


@DTYPES
def test_prompts_and_no_prompt_are_the_pipelines(qwen_image_folder, dtype):
    """Sharded as a run's; behind the template's 34 tokens, cut at the run's length."""
    settings = settings_of(qwen_image_folder, length=LENGTH, compute_dtype=dtype)
    adapter = QWEN_IMAGE.load_adapter(settings, CPU, sharded(str(dtype).removeprefix("torch.")))
    pipeline, cond = stock(qwen_image_folder, dtype), adapter.encode_prompts(PROMPTS)
    null = adapter.null(cond)
    for mine, asked in ((cond, PROMPTS), (null, [" "] * NUM)):
        with torch.no_grad():
            theirs, mask = pipeline.encode_prompt(asked, max_sequence_length=LENGTH)
        seen = torch.ones(theirs.shape[:2]) if mask is None else mask
        assert mine.prompt_embeds.shape[:2] == mine.mask.shape == (NUM, LENGTH)
        assert mine.prompt_embeds.dtype == dtype and mine.pooled is None
        assert mine.lengths == seen.sum(1).tolist()
        for row, length, other in zip(mine.prompt_embeds, mine.lengths, theirs, strict=True):
            torch.testing.assert_close(row[:length], other[:length], **TOLERANCE[dtype])
    assert cond.lengths == [len("a red seven") + TURN, len("two") + TURN, LENGTH]
    assert null.lengths == [1 + TURN] * NUM
    encoder = adapter.pipeline.text_encoder
    assert all(isinstance(p, DTensor) and not p.requires_grad for p in encoder.parameters())


def test_template_and_longest_prompt_are_the_pipelines(qwen_image_folder):
    pipeline = stock(qwen_image_folder)
    assert CHAT.template == pipeline.prompt_template_encode
    for tokenizer in (pipeline.tokenizer, for_plans(64)):
        assert CHAT.head(tokenizer) == pipeline.prompt_template_encode_start_idx
    assert num_tokens(pipeline.tokenizer, ["two", ""], CHAT) == [3 + TURN, TURN]
    most = QWEN_IMAGE.most_tokens(qwen_image_folder)
    pipeline.check_inputs("two", 16, 16, max_sequence_length=most)
    with pytest.raises(ValueError, match=f"cannot be greater than {most}"):
        pipeline.check_inputs("two", 16, 16, max_sequence_length=most + 1)


def test_padding_on_the_left_is_no_other_prompt(qwen_image_folder, tmp_path):
    file = "tokenizer/tokenizer_config.json"
    folder = changed_copy(qwen_image_folder, tmp_path / "left", file, padding_side="left")
    pipeline = stock(folder)
    assert pipeline.tokenizer.padding_side == "left"
    with torch.no_grad():
        theirs, _ = pipeline.encode_prompt(PROMPTS, max_sequence_length=LENGTH)
    cond = opened(folder)[1].encode_prompts(PROMPTS)
    for row, length, other in zip(cond.prompt_embeds, cond.lengths, theirs, strict=True):
        torch.testing.assert_close(row[:length], other[:length], **TOLERANCE[torch.float32])


def test_its_encoder_is_read_layer_by_layer_without_eyes(qwen_image_folder, tmp_path):
    """From files by the names of today, too; only what a prompt goes through is read."""
    folder = tmp_path / "text_encoder"
    shutil.copytree(qwen_image_folder / "text_encoder", folder)
    hubs = load_file(folder / "model.safetensors")
    own = {k.replace("model.layers", "model.language_model.layers"): v for k, v in hubs.items()}
    assert own.keys() != hubs.keys()
    save_file(own, folder / "model.safetensors", metadata={"format": "pt"})
    theirs = QWEN2_5_VL.network.from_pretrained(qwen_image_folder / "text_encoder")
    wanted = dict(theirs.named_parameters()) | dict(theirs.named_buffers())
    wanted = {k: v for k, v in wanted.items() if "visual" not in k and "lm_head" not in k}
    for place in (folder, qwen_image_folder / "text_encoder"):
        source = text_encoder(place, QWEN2_5_VL, torch.float32)
        assert [type(block) for block in source.blocks] == [Qwen2_5_VLDecoderLayer] * 2
        ours = built(source)
        found = dict(ours.named_parameters()) | dict(ours.named_buffers())
        assert found.keys() == wanted.keys()
        assert [k for k in found if not torch.equal(found[k], wanted[k])] == []


def test_a_sample_does_not_depend_on_its_batch(qwen_image_folder):
    """With a mask and without."""
    settings, adapter = opened(qwen_image_folder)
    network = built(QWEN_IMAGE.student(settings))
    check_batch_independence(adapter, network, PROMPTS, **TOLERANCE[torch.float32])


def test_no_number_is_asked_of_a_device(qwen_image_folder):
    """Meta tensors have none: lengths are those of the mask, which lies on the host."""
    settings, adapter = opened(qwen_image_folder)
    network = QWEN_IMAGE.student(settings).network
    inputs = Inputs(network)
    embeds = torch.empty(NUM, LENGTH, 16, device="meta")
    x_t, t = torch.empty(NUM, *adapter.latent_shape(), device="meta"), torch.ones(NUM)
    mask = adapter.encode_prompts(PROMPTS[:2] * 2).mask[:NUM]
    for given, longest in ((mask, 11 + TURN), (mask.to("meta"), LENGTH)):
        v = adapter.predict(network, x_t, t.to("meta"), Conditioning(embeds, mask=given))
        assert v.is_meta and v.shape == x_t.shape
        assert inputs.latest["encoder_hidden_states"].shape[1] == longest


@pytest.mark.parametrize("size", [(16, 16), (32, 20), (48, 48)])
def test_anchors_are_of_one_shift_without_a_last_sigma(qwen_image_folder, size):
    """3 u / (1 + 2 u), at every size and number of steps."""
    settings = settings_of(qwen_image_folder, size)
    path = QWEN_IMAGE.path(settings)
    for num in (1, 2, 4, 8):
        expected = [3 * u / (1 + 2 * u) for u in even_times(num)]
        anchors = QWEN_IMAGE.anchors(settings, tuple(1000 * u for u in even_times(num)))
        assert QWEN_IMAGE.sampled_at(path, anchors) == pytest.approx(expected, rel=1e-6)
        assert QWEN_IMAGE.default_anchors(qwen_image_folder, num) == pytest.approx(expected)
    assert QWEN_IMAGE.default_anchors(qwen_image_folder, 4) == pytest.approx(FOUR)


@pytest.mark.parametrize("num", [1, 4])
def test_a_teachers_own_steps_are_its_folders(qwen_image_folder, num):
    """They end at .02; but of one step diffusers makes NaN, 0 / 0."""
    pipeline = stock(qwen_image_folder)
    plan = Plan(num, "euler", None, SCALE, LENGTH, 16, 16)
    call(pipeline, (16, 16), num, guidance=1, prompts=["a"])
    own = pipeline.scheduler.sigmas
    pipeline.scheduler = QWEN_IMAGE.make_scheduler(pipeline.scheduler, plan)
    (image,) = QWEN_IMAGE.sample(pipeline, ["a"], [torch.Generator()], plan)
    mine = pipeline.scheduler.sigmas
    if num == 1:
        assert own[0].isnan() and mine.tolist() == [1, 0]
    else:
        assert torch.equal(own, mine) and mine[-2].item() == pytest.approx(0.02, rel=1e-5)
    assert image.size == (16, 16)


def test_fewer_and_more_steps_of_a_student(qwen_image_folder):
    """Fewer are among its anchors; 8 go through the shift of its 4."""
    anchors = QWEN_IMAGE.default_anchors(qwen_image_folder, 4)
    for num in (1, 2):
        chosen = QWEN_IMAGE.levels.of_steps(anchors, num)
        assert len(chosen) == num and set(chosen) <= set(anchors)
    dense = QWEN_IMAGE.levels.of_steps(anchors, 8)
    assert set(anchors) <= set(dense)
    assert dense == pytest.approx(QWEN_IMAGE.default_anchors(qwen_image_folder, 8))


def test_a_folder_of_a_constant_shift_keeps_it_and_a_run_may_have_another(
    qwen_image_folder, tmp_path
):
    own = dict(use_dynamic_shifting=False, shift=2.0, shift_terminal=None)
    folder = with_scheduler(qwen_image_folder, tmp_path / "fixed", **own)
    assert (shift_of(folder), shift_of(qwen_image_folder)) == (2, 3)
    for settings in (settings_of(folder), settings_of(qwen_image_folder, shift=2.0)):
        anchors = QWEN_IMAGE.anchors(settings, TIMES)
        levels = QWEN_IMAGE.sampled_at(QWEN_IMAGE.path(settings), anchors)
        assert levels == pytest.approx((1, 6 / 7, 2 / 3, 0.4))


def with_scheduler(folder, target, **config) -> Path:
    return changed_copy(folder, target, "scheduler/scheduler_config.json", **config)


@pytest.mark.parametrize("num", [1, 2, 4, 8])
def test_a_plain_pipeline_draws_at_a_students_anchors(qwen_image_folder, num):
    """By the number of steps, to the bit as our own script rounds them, with the scheduler's own
    shift and last sigma taken out."""
    anchors = tuple(QWEN_IMAGE.default_anchors(qwen_image_folder, num))
    given = QWEN_IMAGE.stock_sampling(anchors)
    assert given.levels == {"num_inference_steps": num} and given.guidance == 1
    pipeline = stock(qwen_image_folder)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(
        pipeline.scheduler.config, **given.changes
    )
    call(pipeline, (16, 16), num, guidance=given.guidance, prompts=["a"])
    rounded = torch.tensor(QWEN_IMAGE.rounded(anchors, list(anchors)))
    assert torch.equal(pipeline.scheduler.sigmas[:-1], rounded)


def test_vae_both_ways_as_the_pipeline_scales_it(qwen_image_folder):
    _, adapter = opened(qwen_image_folder)
    vae, z = adapter.pipeline.vae, torch.randn(2, *adapter.latent_shape()).requires_grad_()
    pipeline = stock(qwen_image_folder)
    pack = partial(QwenImagePipeline._pack_latents, batch_size=2, num_channels_latents=4)
    packed = pack(z.detach(), height=16, width=16)
    pipeline.scheduler.step = lambda prediction, t, latents, **_: (packed,)
    theirs = call(pipeline, (32, 32), 1, guidance=1, prompts=["a", "b"], output_type="pt")
    ours = adapter.decode(z)
    assert ours.shape == (2, 3, 32, 32)
    torch.testing.assert_close((ours.detach() / 2 + 0.5).clamp(0, 1), theirs)
    (100 * ours).sum().backward()
    assert z.grad.abs().sum() > 0 and all(p.grad is None for p in vae.parameters())

    images, eps = torch.rand(2, 3, 32, 32) * 2 - 1, torch.randn(2, *adapter.latent_shape())
    with torch.no_grad():
        posterior = vae.encode(images[:, :, None]).latent_dist
    mean, std = (torch.tensor(values).view(1, 4, 1, 1) for values in (MEAN, STD))
    expected = ((posterior.mean + posterior.std * eps[:, :, None])[:, :, 0] - mean) / std
    torch.testing.assert_close(adapter.draw_latents(adapter.encode_images(images), eps), expected)


def test_gradients_leave_pixels_that_are_saturated(qwen_image_folder):
    """The VAE's own decode clamps them."""
    _, adapter = opened(qwen_image_folder)
    with torch.no_grad():
        adapter.pipeline.vae.decoder.conv_out.bias.fill_(3)
    z = torch.randn(1, *adapter.latent_shape()).requires_grad_()
    images = adapter.decode(z)
    images.sum().backward()
    assert images.min() > 1 and z.grad.abs().min() > 0


def test_a_table_of_positions_has_numbers_wherever_a_network_is_built(qwen_image_folder):
    """It is neither a parameter nor a buffer, and what gives a network memory passes it over."""
    network = QWEN_IMAGE.student(settings_of(qwen_image_folder)).network
    theirs = stock(qwen_image_folder).transformer.pos_embed
    assert torch.equal(network.pos_embed.pos_freqs, theirs.pos_freqs)
    assert torch.equal(network.pos_embed.neg_freqs, theirs.neg_freqs)
    assert network.pos_embed.axes_dim == theirs.axes_dim and network.pos_embed.scale_rope


def test_student_is_the_teacher(qwen_image_folder):
    settings = settings_of(qwen_image_folder, compute_dtype=torch.bfloat16)
    teacher, student = QWEN_IMAGE.teacher(settings), QWEN_IMAGE.student(settings)
    assert len(student.blocks) == len(student.repeated) == 2
    state = {(p.dtype, p.requires_grad) for p in teacher.network.parameters()}
    assert state == {(torch.bfloat16, False)}
    assert {(p.dtype, p.requires_grad) for p in student.network.parameters()} == {
        (torch.float32, True)
    }
    teacher = QWEN_IMAGE.teacher(replace(settings, compute_dtype=torch.float32))
    assert_same_weights(built(student), built(teacher))


def refused(message: str, folder: Path, *args, **rest) -> None:
    with pytest.raises(ValueError, match=message):
        QWEN_IMAGE.require(settings_of(folder, *args, **rest))


def test_settings_that_do_not_fit_are_refused(qwen_image_folder, flux_folder, tmp_path):
    QWEN_IMAGE.require(settings_of(qwen_image_folder, (48, 20), LENGTH))
    refused("no model_index.json", tmp_path)
    refused("holds a FluxPipeline, this recipe distils a QwenImagePipeline", flux_folder)
    refused(rf"\[32, 34\].*multiples of {UNIT}", qwen_image_folder, (32, 34))
    refused("max_sequence_length is missing", qwen_image_folder, length=None)
    refused("max_sequence_length 41: .* was made for 40", qwen_image_folder, length=41)
    file = "tokenizer/tokenizer_config.json"
    folder = changed_copy(qwen_image_folder, tmp_path / "long", file, model_max_length=131072)
    refused("max_sequence_length 1025: Qwen-Image takes 1024 tokens", folder, length=1025)
    refused("for FLUX alone", qwen_image_folder, length=LENGTH, guidance=3.5)


@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        ("model_index.json", {"_class_name": "QwenImageEditPipeline"},
         "holds a QwenImageEditPipeline, this recipe distils a QwenImagePipeline"),
        ("transformer/config.json", {"zero_cond_t": True}, "the network that edits images"),
        ("transformer/config.json", {"use_layer3d_rope": True}, "draws them in layers"),
        ("transformer/config.json", {"out_channels": 16}, "out_channels is 16, and the VAE's"),
        ("vae/config.json", {"input_channels": 4}, "images have 3 channels"),
        ("vae/config.json", {"_class_name": "AutoencoderKL"}, "encodes with an AutoencoderKLQwen"),
        ("vae/config.json", {"latents_mean": None}, "latents_mean is null, and must be 4 numbers"),
        ("vae/config.json", {"latents_mean": [1, 2, 3, "4"]}, "and must be 4 numbers, one for"),
        ("vae/config.json", {"latents_std": [1, 2, 3]}, r"is \[1, 2, 3\], and must be 4 num"),
        ("vae/config.json", {"latents_std": [0, 1, 2, 3]}, "must be 4 numbers above 0"),
        ("text_encoder/config.json", {"hidden_size": 8}, "joint_attention_dim is 16, and the"),
        ("scheduler/scheduler_config.json", {"use_beta_sigmas": True}, "use_beta_sigmas is true"),
        ("model_index.json", {"text_encoder": [None, None]}, "leaves out text_encoder, which is"),
    ],
)  # fmt: skip
def test_neighbouring_teachers_are_named(qwen_image_folder, tmp_path, file, changes, said):
    refused(said, changed_copy(qwen_image_folder, tmp_path / "other", file, **changes))


def test_latents_that_cannot_be_normalised_are_not_drawn(qwen_image_folder, tmp_path):
    """Where the config says nothing, diffusers' class has numbers for 16 channels."""
    folder = changed_copy(qwen_image_folder, tmp_path / "three", "vae/config.json")
    file = folder / "vae" / "config.json"
    said = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in said.items() if k != "latents_mean"}))
    with pytest.raises(ValueError, match="latents_mean is null, and must be 4 numbers"):
        load_teacher(folder)
    rest = {k: v for k, v in said.items() if not k.startswith("latents_")}
    file.write_text(json.dumps({**rest, "z_dim": 16}))
    require_statistics(folder)
    made = AutoencoderKLQwenImage(base_dim=8).config
    assert len(made.latents_mean) == len(made.latents_std) == made.z_dim == 16


def test_another_models_tokenizer_is_named(qwen_image_folder, tmp_path):
    """By its special tokens before it is opened, by its words afterwards; it needs no template."""
    folder = Path(shutil.copytree(qwen_image_folder, tmp_path / "plain"))
    (folder / "tokenizer" / "chat_template.jinja").unlink()
    settings = settings_of(folder, length=LENGTH)
    QWEN_IMAGE.require(settings)
    cond = QWEN_IMAGE.load_adapter(settings, CPU, built).encode_prompts(["a"])
    assert type(cond.mask) is torch.Tensor and cond.lengths == [1 + TURN]
    file = folder / "tokenizer" / "tokenizer.json"
    whole = file.read_text()
    file.write_text(whole.replace(" quantity", " quality"))
    with pytest.raises(ValueError, match=r"tokenizer reads .* as 42 tokens, .* drops 34"):
        QWEN_IMAGE.load_adapter(settings, CPU, built)
    for one in (folder / "tokenizer").glob("*.json"):
        one.write_text(one.read_text().replace("<|im_end|>", "<|end|>"))
    refused(r"does not know <\|im_end\|>, which the chat template writes", folder, length=LENGTH)
    shutil.rmtree(folder / "tokenizer")
    refused("tokenizer: there is no such folder", folder, length=LENGTH)


def test_an_encoder_of_another_kind_is_named(qwen_image_folder, tmp_path):
    index = json.loads((qwen_image_folder / "model_index.json").read_text())
    index["text_encoder"] = ["transformers", "Qwen3Model"]
    folder = changed_copy(qwen_image_folder, tmp_path / "qwen3", "model_index.json", **index)
    with pytest.raises(ValueError, match="holds a Qwen3Model, not one of Qwen2_5_VL"):
        QWEN_IMAGE.load_adapter(settings_of(folder, length=LENGTH), CPU, built)


def test_a_student_of_few_steps_is_named_before_it_is_distilled(qwen_image_folder, tmp_path):
    assert QWEN_IMAGE.cautions(qwen_image_folder) == []
    assert QWEN_IMAGE.cautions(tmp_path / "Qwen-Image-2512") == []
    (said,) = QWEN_IMAGE.cautions(tmp_path / "Qwen-Image-Lightning")
    assert "is distilled already, by its name" in said
