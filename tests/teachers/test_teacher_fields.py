"""Every field of the installed diffusers' and transformers' configs has a verdict, and holds it."""

import inspect
import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from cases import CASES
from command_line import PROMPTS, call, error_of, only_picture, sidecars
from diffusers import EulerDiscreteScheduler
from short_runs import configure
from teacher_parts import changed_copy, settings_of
from transformers import CLIPTextConfig, Qwen2_5_VLTextConfig, Qwen3Config, T5Config

from senseflow.config.families import family_of
from senseflow.config.recipes import FAMILIES, RECIPES
from senseflow.engine.inputs import read_setup
from senseflow.teachers.family import Plan
from senseflow.teachers.sdxl.family import SDXL

TINY = Path("assets/tiny")
RECIPE = {"flux": "flux_senseflow", "sdxl": "sdxl_senseflow", "sd35_medium": "sd35_senseflow"}
FAMILY = {name: RECIPES[recipe].family for name, recipe in RECIPE.items()}
# Of the pipelines themselves. A setting that is not here changes what a teacher computes, or not.
PARTS = {"scheduler", "vae", "transformer", "unet", "image_encoder", "feature_extractor"}
PARTS |= {f"{part}{n}" for part in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")}
SETTINGS = {"force_zeros_for_empty_prompt", "add_watermarker"}  # read; students bear no watermark
SETTINGS |= {"is_distilled"}
# Of the text encoders, which their classes build from their configs: what does not change a frozen
# encoder's states, and what does.
FREE = {
    *("architectures", "attention_dropout", "bos_token_id", "chunk_size_feed_forward", "dtype"),
    *("id2label", "initializer_factor", "initializer_range", "label2id", "model_type"),
    *("output_attentions", "output_hidden_states", "pad_token_id", "problem_type", "return_dict"),
    *("transformers_version", "_name_or_path", "is_encoder_decoder", "classifier_dropout"),
    *("dropout_rate", "is_decoder", "num_decoder_layers", "use_cache", "scale_decoder_outputs"),
}
CLIP_BUILT = {
    *("vocab_size", "hidden_size", "intermediate_size", "projection_dim", "num_hidden_layers"),
    *("num_attention_heads", "max_position_embeddings", "hidden_act", "layer_norm_eps"),
    "eos_token_id",  # where the pooled state is taken
}
T5_BUILT = {
    *("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "dense_act_fn"),
    *("relative_attention_num_buckets", "relative_attention_max_distance", "is_gated_act"),
    *("layer_norm_epsilon", "feed_forward_proj", "tie_word_embeddings", "eos_token_id"),
}
QWEN3_BUILT = {
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
    *("num_attention_heads", "num_key_value_heads", "hidden_act", "max_position_embeddings"),
    *("rms_norm_eps", "rope_parameters", "attention_bias", "use_sliding_window"),
    *("sliding_window", "max_window_layers", "layer_types", "tie_word_embeddings", "eos_token_id"),
}


def signature(name: str) -> dict[str, inspect.Parameter]:
    parameters = dict(inspect.signature(getattr(diffusers, name).__init__).parameters)
    del parameters["self"]
    return parameters


def tables() -> list[tuple]:
    held = {f"{f.title}, {part}": fields for f in FAMILIES for part, fields in f.fields.items()}
    return [pytest.param(fields, id=name) for name, fields in held.items()]


@pytest.mark.parametrize("fields", tables())
def test_the_tables_hold_the_signatures(fields):
    """A new field of a new diffusers fails here until it is read, refused, or found to be idle."""
    used, idle, known = fields.used.split(), fields.idle.split(), [*fields.known]
    every = [*used, *idle, *known]
    assert len(every) == len(set(every))
    found = {name: signature(name) for name in fields.classes}
    assert {name for one in found.values() for name in one} == set(every)
    for name, known in fields.known.items():
        for one in (one[name] for one in found.values() if name in one):
            assert one.default == known.default, (name, one.default)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.title)
def test_the_tables_hold_all_parts_of_a_pipeline(family):
    assert set(family.fields) == {family.component, "vae", "scheduler"}
    assert set(signature(family.pipeline_class)) <= PARTS | SETTINGS


@pytest.mark.parametrize(
    ("config", "built"),
    [
        (CLIPTextConfig, CLIP_BUILT),
        (T5Config, T5_BUILT),
        (Qwen3Config, QWEN3_BUILT),
        (Qwen2_5_VLTextConfig, QWEN3_BUILT - {"head_dim", "attention_bias", "tie_word_embeddings"}),
    ],
)
def test_text_encoders_have_no_other_fields(config, built):
    assert set(config().to_dict()) - FREE == built


def without_weights(name: str, folder: Path) -> Path:
    """A copy of an embedded teacher's JSON files."""
    ignored = shutil.ignore_patterns("*.safetensors")
    return Path(shutil.copytree(TINY / name / "pipeline", folder, ignore=ignored))


def answer(name: str, folder: Path) -> str:
    """What the training script says of a teacher's folder before it starts any process."""
    config = configure(folder, f"paths.pretrained_model={folder}", recipe=RECIPE[name])
    with pytest.raises(ValueError) as error:
        read_setup(config, FAMILY[name])
    (line,) = str(error.value).splitlines()
    return line


@pytest.mark.parametrize("name", RECIPE)
def test_other_values_are_refused_by_name(name, tmp_path):
    folder = without_weights(name, tmp_path / "teacher")
    for part, fields in FAMILY[name].fields.items():
        file = folder / part / fields.file
        whole = file.read_text()
        for field, known in fields.known.items():
            for other in (v for v in (7, "odd", True, [1.0]) if v not in known.values):
                file.write_text(json.dumps({**json.loads(whole), field: other}))
                said = answer(name, folder)
                assert said.startswith(f"{file}: {field} is {json.dumps(other)}: "), said
        file.write_text(json.dumps({**json.loads(whole), "_class_name": "OtherClass"}))
        assert f"{file} is of the class OtherClass, " in answer(name, folder)
        file.write_text(json.dumps({**json.loads(whole), "quantization_config": {}}))
        if part != "scheduler":
            assert f"{file}: its weights are quantized" in answer(name, folder)
        file.write_text(whole)


OTHER_NETWORKS = {
    "an inpainting UNet": ("sdxl", "unet", dict(in_channels=9), "in_channels is 9"),
    "another VAE": ("flux", "vae", dict(latent_channels=4), "the VAE's latents have 4 channels"),
    "a refiner": ("sdxl", "unet", dict(projection_class_embeddings_input_dim=88), "no SDXL base"),
    "SD3 Medium": ("sd35_medium", "transformer", dict(qk_norm=None), "SD3 Medium of 2024"),
    "4 bits": ("flux", "text_encoder_2", dict(quantization_config={"quant_method": "bitsandbytes"}),
               "quantized (bitsandbytes); full ones are needed"),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHER_NETWORKS)
def test_networks_of_another_kind_are_named(case, tmp_path):
    name, part, changes, said = OTHER_NETWORKS[case]
    folder = without_weights(name, tmp_path / "teacher")
    file = folder / part / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    assert said in answer(name, folder)


IDLE = dict(
    clip_sample=True, clip_sample_range=0.1, thresholding=True, sample_max_value=0.1,
    dynamic_thresholding_ratio=0.5, set_alpha_to_one=False, steps_offset=0,
    timestep_spacing="trailing", use_karras_sigmas=True, interpolation_type="log_linear",
    final_sigmas_type="sigma_min", original_inference_steps=20, timestep_scaling=0.001,
    variance_type="learned", skip_prk_steps=True, sigma_min=0.1, sigma_max=3.0,
)  # fmt: skip


@pytest.mark.parametrize("sampler", ["x0", "euler"])
def test_how_a_base_steps_is_not_a_students(sampler, sdxl_folder, tmp_path):
    """Its noise schedule is: path and images do not change with the idle fields alone."""
    file = "scheduler/scheduler_config.json"
    other = changed_copy(sdxl_folder, tmp_path / "other", file, **IDLE)
    assert set(IDLE) <= set(SDXL.fields["scheduler"].idle.split())
    paths = [SDXL.path(settings_of(base, length=None)) for base in (sdxl_folder, other)]
    t = torch.arange(1000.0)
    assert all(torch.equal(*pair) for pair in zip(*(p.alpha_sigma(t) for p in paths), strict=True))
    CASES["sdxl"].student().save_pretrained(tmp_path / "student")
    flags = ["--checkpoint", tmp_path / "student", "--sampler", sampler, "--prompt", PROMPTS[0]]
    flags += ["--height", 24, "--width", 32, "--output_dir"]
    for base in (sdxl_folder, other):
        assert call(SDXL, base, *flags, tmp_path / f"{base.name} {sampler}") == 0
    plain, changed = (only_picture(tmp_path / f"{b.name} {sampler}") for b in (sdxl_folder, other))
    assert (plain == changed).all()


def test_a_students_schedule_is_its_teachers_own(sdxl_folder, tmp_path):
    """A base of other betas, in a class whose defaults are neither SDXL's nor LCM's."""
    betas = dict(beta_start=0.0005, beta_end=0.01, beta_schedule="linear")
    file = "scheduler/scheduler_config.json"
    base = changed_copy(
        sdxl_folder, tmp_path / "base", file, _class_name="HeunDiscreteScheduler", **betas
    )
    expected = EulerDiscreteScheduler(**betas).alphas_cumprod
    alpha, _ = SDXL.path(settings_of(base, length=None)).alpha_sigma(torch.arange(1000.0))
    torch.testing.assert_close(alpha**2, expected)
    own = diffusers.HeunDiscreteScheduler.from_pretrained(base, subfolder="scheduler")
    plans = [Plan(4, sampler, [999.0, 499.0], None, None, 24, 32) for sampler in ("x0", "euler")]
    for scheduler in (SDXL.make_scheduler(own, plan) for plan in plans):
        torch.testing.assert_close(scheduler.alphas_cumprod, expected)
    assert SDXL.schedule(base) == betas


@pytest.mark.parametrize(
    ("name", "file", "field", "said"),
    [
        ("sdxl", "text_encoder/config.json", "hidden_size", "cross_attention_dim is 80, and the"),
        ("sd35_medium", "text_encoder_3/config.json", "d_model", "joint_attention_dim is 96, and"),
        ("sd35_medium", "text_encoder_2/config.json", "projection_dim", "pooled_projection_dim is"),
        (
            "flux",
            "text_encoder_2/config.json",
            "d_model",
            "joint_attention_dim is 64, and the text",
        ),
        ("flux", "text_encoder/config.json", "hidden_size", "pooled_projection_dim is 64, and the"),
    ],
)
def test_text_encoders_of_another_width_are_refused_with_both(
    name, file, field, said, tmp_path, capsys
):
    family, base = FAMILY[name], TINY / name / "pipeline"
    changed = changed_copy(base, tmp_path / "base", file, **{field: 1000})
    flags = ("--teacher", "--prompt", PROMPTS[0], "--output_dir", tmp_path / "out")
    error = error_of(capsys, family, changed, *flags)
    assert f"{family.component}/config.json: {said}" in error and "1000" in error
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="they are of another teacher"):
        family_of(changed, "--base")


def test_a_teachers_sidecar_has_a_time_for_each_of_heuns_forwards(sdxl_folder, tmp_path):
    file = "scheduler/scheduler_config.json"
    named = {"scheduler": ["diffusers", "HeunDiscreteScheduler"]}
    first = changed_copy(sdxl_folder, tmp_path / "first", "model_index.json", **named)
    base = changed_copy(first, tmp_path / "base", file, _class_name="HeunDiscreteScheduler")
    flags = ("--teacher", "--steps", 3, "--height", 24, "--width", 32, "--prompt", PROMPTS[0])
    assert call(SDXL, base, *flags, "--output_dir", tmp_path / "out") == 0
    own = diffusers.HeunDiscreteScheduler.from_pretrained(base, subfolder="scheduler")
    own.set_timesteps(3)
    (made,) = sidecars(tmp_path / "out")
    assert made["timesteps"] == own.timesteps.tolist() and len(made["timesteps"]) == 5
