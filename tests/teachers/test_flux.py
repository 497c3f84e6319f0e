"""The FLUX adapter against FluxPipeline's own call, schedule and files."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from safetensors.torch import load_file, save_file
from teacher_parts import (
    CPU,
    PROMPTS,
    Inputs,
    assert_same_weights,
    built,
    changed_copy,
    settings_of,
)
from text_parts import T5_LENGTH

from senseflow.teachers.flux.adapter import GUIDANCE_EMBEDDER, FluxAdapter, pack, unpack
from senseflow.teachers.flux.family import FLUX

LENGTH = 12
TIMES = (1000.0, 750.0, 500.0, 250.0)
FLUX_DEV = dict(
    shift=3.0,
    use_dynamic_shifting=True,
    base_shift=0.5,
    max_shift=1.15,
    base_image_seq_len=256,
    max_image_seq_len=4096,
)


def adapter_of(folder, resolution=(32, 32), dtype=torch.float32) -> FluxAdapter:
    return FLUX.load_adapter(
        settings_of(folder, resolution, LENGTH, compute_dtype=dtype), CPU, built
    )


def side_of(folder, tokens: int) -> int:
    """Pixels of a square with tokens x tokens image tokens."""
    return tokens * 2 * FluxPipeline.from_pretrained(folder, transformer=None).vae_scale_factor


def seen_by_the_network(folder, dtype, **call):
    """Inputs and outputs of the transformer in FluxPipeline's own call, step by step."""
    pipeline = FluxPipeline.from_pretrained(folder, torch_dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    seen = []

    def hook(module, args, kwargs, output):
        seen.append((dict(kwargs), output[0].clone()))

    pipeline.transformer.register_forward_hook(hook, with_kwargs=True)
    pipeline(
        PROMPTS,
        max_sequence_length=LENGTH,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
        **call,
    )
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [(4, 4), (3, 5)])
def test_prediction_equals_the_pipelines_own_call_at_all_anchors(flux_folder, dtype, tokens):
    """Packing, ids, prompts, guidance and time, in the type the pipeline runs in."""
    unit = side_of(flux_folder, 1)
    height, width = tokens[0] * unit, tokens[1] * unit
    seen = seen_by_the_network(
        flux_folder, dtype, height=height, width=width, num_inference_steps=4, guidance_scale=3.5
    )
    settings = settings_of(flux_folder, (height, width), LENGTH, compute_dtype=dtype)
    adapter = FLUX.load_adapter(settings, CPU, built)
    teacher = built(FLUX.teacher(settings))
    inputs = Inputs(teacher)
    cond = adapter.encode_prompts(PROMPTS)
    anchors = FLUX.anchors(settings, TIMES).times
    assert len(seen) == 4
    for tau, (given, output) in zip(anchors, seen, strict=True):
        _, h, w = adapter.latent_shape()
        with torch.no_grad():
            v = adapter.predict_guided(
                teacher,
                unpack(given["hidden_states"].float(), h, w),
                torch.full((2,), tau),
                cond,
                torch.full((2,), 3.5),
            )
        received = inputs.latest
        for name in ("hidden_states", "encoder_hidden_states", "pooled_projections"):
            assert torch.equal(received[name], given[name]), name
        same_time = dict(rtol=2e-7, atol=0) if dtype == torch.float32 else dict(rtol=0, atol=0)
        torch.testing.assert_close(received["timestep"], given["timestep"], **same_time)
        assert torch.equal(received["img_ids"], given["img_ids"].float())
        torch.testing.assert_close(v, unpack(output.float(), h, w), atol=1e-5, rtol=1e-4)


def test_pack_is_the_pipelines_and_unpack_its_inverse():
    latents = torch.randn(2, 4, 6, 8)
    expected = FluxPipeline._pack_latents(latents, 2, 4, 6, 8)
    assert torch.equal(pack(latents), expected)
    assert torch.equal(unpack(pack(latents), 6, 8), latents)


@pytest.mark.parametrize("side", [256, 512, 1024])
def test_anchors_are_those_of_diffusers_own_scheduler(flux_folder, tmp_path, side):
    """FLUX.1-dev's scheduler at real numbers of tokens, as FluxPipeline sets it for 4 steps."""
    folder = with_scheduler(flux_folder, tmp_path / "dev", **FLUX_DEV)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.25, 4), mu=calculate_shift((side // 16) ** 2))
    same_tokens = side_of(flux_folder, side // 16)
    settings = settings_of(folder, (same_tokens, same_tokens))
    anchors = FLUX.anchors(settings, TIMES)
    assert anchors.times == pytest.approx((1000 * scheduler.sigmas[:-1]).tolist(), rel=1e-6)
    assert anchors.times[0] == 1000 and anchors.end == FLUX.path(settings).clean
    on_the_card = FLUX.sampled_at(FLUX.path(settings), anchors)
    assert on_the_card == pytest.approx(scheduler.sigmas[:-1].tolist(), rel=1e-6)


def with_scheduler(folder, target, **config) -> Path:
    return changed_copy(folder, target, "scheduler/scheduler_config.json", **config)


def test_anchors_of_other_shifts(flux_folder, tmp_path):
    """A scheduler's constant shift, its linear dynamic one, and a shift the run gives."""
    constant = settings_of(flux_folder)  # the tests' own folder: shift 3.1582
    assert FLUX.anchors(constant, TIMES).times == pytest.approx(
        [1000, 904.5, 759.5, 512.8], abs=0.06
    )
    folder = with_scheduler(flux_folder, tmp_path / "l", **FLUX_DEV, time_shift_type="linear")
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.25, 4), mu=calculate_shift(64))
    expected = (1000 * scheduler.sigmas[:-1]).tolist()
    assert FLUX.anchors(settings_of(folder), TIMES).times == pytest.approx(expected, rel=1e-6)
    given = settings_of(folder, shift=3.0)
    assert FLUX.anchors(given, TIMES).times == pytest.approx((1000, 900, 750, 500))


def test_vae_both_ways_as_the_pipeline_scales_it(flux_folder):
    adapter = adapter_of(flux_folder)
    vae = adapter.pipeline.vae
    images, eps = torch.rand(2, 3, 32, 32) * 2 - 1, torch.randn(2, *adapter.latent_shape())
    z = adapter.draw_latents(adapter.encode_images(images), eps)
    posterior = vae.encode(images).latent_dist
    expected = posterior.mean + posterior.std * eps
    torch.testing.assert_close(z / vae.config.scaling_factor + vae.config.shift_factor, expected)
    z.requires_grad_(True)
    decoded = adapter.decode(z)
    torch.testing.assert_close(decoded, vae.decode(expected).sample)
    decoded.sum().backward()
    assert z.grad.abs().sum() > 0 and all(p.grad is None for p in vae.parameters())


def test_student_is_the_teacher_without_its_guidance_embedding(flux_folder):
    settings = settings_of(flux_folder)
    mine = built(FLUX.student(settings)).state_dict()
    theirs = built(FLUX.teacher(settings)).state_dict()
    assert {k for k in theirs if k not in mine} == {
        k for k in theirs if k.startswith(GUIDANCE_EMBEDDER)
    }
    assert all(torch.equal(mine[k], theirs[k]) for k in mine)


def test_teacher_is_frozen_in_its_own_dtype_and_the_student_learns_in_float32(flux_folder):
    settings = settings_of(flux_folder, compute_dtype=torch.bfloat16)
    teacher, student = FLUX.teacher(settings).network, FLUX.student(settings).network
    assert {(p.dtype, p.requires_grad) for p in teacher.parameters()} == {(torch.bfloat16, False)}
    assert {(p.dtype, p.requires_grad) for p in student.parameters()} == {(torch.float32, True)}


@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_folded_guidance_is_exact(flux_folder, guidance):
    settings = settings_of(flux_folder)
    adapter, teacher = adapter_of(flux_folder), built(FLUX.teacher(settings))
    folded = built(FLUX.student(settings_of(flux_folder, fold_guidance=guidance)))
    dropped = built(FLUX.student(settings))
    cond = adapter.encode_prompts(["a", "b"])
    x_t, t = torch.randn(2, *adapter.latent_shape()), torch.tensor([1000.0, 512.8])
    with torch.no_grad():
        expected = adapter.predict_guided(teacher, x_t, t, cond, torch.full((2,), guidance))
        torch.testing.assert_close(
            adapter.predict(folded, x_t, t, cond), expected, atol=1e-5, rtol=1e-4
        )
        assert not torch.allclose(adapter.predict(dropped, x_t, t, cond), expected, atol=1e-5)


def linked_folder(flux_folder, tmp_path) -> Path:
    """The seed README's folder: links to the teacher's shards, and its own config.json."""
    teacher, linked = tmp_path / "teacher", tmp_path / "flux-wo-guidance-embed" / "transformer"
    shutil.copytree(flux_folder, teacher)
    linked.mkdir(parents=True)
    folder = teacher / "transformer"
    state = load_file(folder / "diffusion_pytorch_model.safetensors")
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    keys = sorted(state)
    shards = {"a.safetensors": keys[::2], "b.safetensors": keys[1::2]}
    for name, part in shards.items():
        save_file({k: state[k] for k in part}, folder / name)
    weight_map = {k: name for name, part in shards.items() for k in part}
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for file in folder.iterdir():
        if file.name != "config.json":
            (linked / file.name).symlink_to(file)
    config = json.loads((folder / "config.json").read_text())
    (linked / "config.json").write_text(json.dumps({**config, "guidance_embeds": False}))
    return linked.parent


def test_the_readmes_folder_of_links_gives_the_same_student(flux_folder, tmp_path):
    linked = linked_folder(flux_folder, tmp_path)
    one = built(FLUX.student(settings_of(tmp_path / "teacher", linked=linked)))
    assert_same_weights(one, built(FLUX.student(settings_of(flux_folder))))


def test_a_student_config_with_a_guidance_embedding_is_refused(flux_folder, tmp_path):
    linked = linked_folder(flux_folder, tmp_path)
    theirs = flux_folder / "transformer" / "config.json"
    for settings in (
        settings_of(flux_folder, student_config=theirs),
        settings_of(tmp_path / "teacher", linked=linked, student_config=theirs),
    ):
        with pytest.raises(ValueError, match="must say guidance_embeds: false"):
            FLUX.student(settings)


def test_a_dangling_link_is_an_error(flux_folder, tmp_path):
    linked = linked_folder(flux_folder, tmp_path)
    (tmp_path / "teacher" / "transformer" / "b.safetensors").unlink()
    with pytest.raises(ValueError, match=r"b.safetensors is a link to .* which does not exist"):
        FLUX.student(settings_of(tmp_path / "teacher", linked=linked))


def test_a_truncated_weights_file_is_named(flux_folder, tmp_path):
    shutil.copytree(flux_folder, tmp_path / "teacher")
    file = tmp_path / "teacher" / "transformer" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged"):
        FLUX.teacher(settings_of(tmp_path / "teacher"))


def test_a_full_size_config_does_not_fit_and_the_keys_are_named(flux_folder):
    full = Path("exp_flux/flux-wo-guidance-embed/transformer/config.json")
    with pytest.raises(ValueError, match=r"do not fit.*[0-9]+ missing \("):
        FLUX.student(settings_of(flux_folder, student_config=full))


def test_folders_that_are_no_flux_teacher(flux_folder, tmp_path):
    with pytest.raises(ValueError, match=r"no model_index.json"):
        FLUX.require(settings_of(tmp_path))
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusion3Pipeline"}')
    with pytest.raises(ValueError, match=r"holds a StableDiffusion3Pipeline"):
        FLUX.require(settings_of(tmp_path))
    FLUX.require(settings_of(flux_folder))


def test_a_teacher_without_guidance_embedding_is_refused(flux_folder, tmp_path):
    file = "transformer/config.json"
    folder = changed_copy(flux_folder, tmp_path / "teacher", file, guidance_embeds=False)
    with pytest.raises(ValueError, match="has no guidance embedding"):
        FLUX.teacher(settings_of(folder))


def test_t5_lengths_the_teacher_does_not_know(flux_folder):
    with pytest.raises(ValueError, match=r"max_sequence_length 99.*was made for 16"):
        FLUX.require(settings_of(flux_folder, length=99))
    with pytest.raises(ValueError, match=r"max_sequence_length is missing"):
        FLUX.require(settings_of(flux_folder, length=None))
    FLUX.require(settings_of(flux_folder, length=T5_LENGTH))


def test_resolutions_that_do_not_fit_are_refused(flux_folder):
    with pytest.raises(ValueError, match=r"train.resolution \[32, 34\].*multiples of 4"):
        FLUX.require(settings_of(flux_folder, (32, 34)))
