"""Teachers as people have them, through the commands: damaged, in part, in variants, elsewhere."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import CASES
from command_line import PROMPTS, call, error_of, grey_levels_apart, only_picture
from diffusers import StableDiffusion3Pipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from short_runs import begin, configure, finish, write_pictures
from teacher_parts import CPU, built, changed_copy, settings_of

from senseflow.app import __main__ as app
from senseflow.cache.__main__ import main as cache
from senseflow.config.families import family_of
from senseflow.config.recipes import RECIPES
from senseflow.data.check.wording import read_tokenizers
from senseflow.engine.build import check_teacher
from senseflow.engine.inputs import read_inputs, read_setup
from senseflow.evaluate.__main__ import main as evaluate
from senseflow.teachers.family import Family
from senseflow.teachers.sd35.family import SD35, SD35_LARGE
from senseflow.teachers.sdxl.family import SDXL
from senseflow.weights.filling import whole

SIZE = ("--height", 24, "--width", 32)
DRAW = ("--teacher", "--steps", 2, *SIZE, "--prompt", PROMPTS[0], "--output_dir")
TINY = Path("assets/tiny")
NO_T5 = {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}


def drawn(pipeline, guidance: float, **more: object) -> np.ndarray:
    """The picture of the stock pipeline's own call, as DRAW asks for it."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    more = dict(height=24, width=32, num_inference_steps=2, generator=generator, **more)
    return np.array(pipeline(PROMPTS[0], guidance_scale=guidance, **more).images[0])


# ------------------------------------------------------------------------------------ damaged ones


def damaged(base: Path, folder: Path, part: str) -> tuple[Path, str]:
    """A copy of a pipeline whose part lacks its last tensor, and the tensor's name."""
    shutil.copytree(base, folder)
    (file,) = (folder / part).glob("*.safetensors")
    state = load_file(file)
    state.pop(lost := sorted(state)[-1])
    save_file(state, file, metadata={"format": "pt"})
    return folder, lost.removeprefix("text_model.")


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2", "vae", "unet"])
def test_a_damaged_part_is_named_with_its_key(part, sdxl_folder, tmp_path, capsys):
    base, lost = damaged(sdxl_folder, tmp_path / "base", part)
    said = rf"{base / part}.* 1 missing \(\S*{re.escape(lost)}\)"
    assert re.search(said, error_of(capsys, SDXL, base, *DRAW, tmp_path / "out"))
    assert not list(tmp_path.glob("out/*.png"))
    (tmp_path / "prompts.txt").write_text(PROMPTS[0])
    line = ["generate", "--base", base, "--prompts_file", tmp_path / "prompts.txt", *SIZE]
    assert evaluate([str(word) for word in [*line, "--output_dir", tmp_path / "evaluated"]]) == 2
    assert re.search(said, capsys.readouterr().err)
    if part != "unet":
        CASES["sdxl"].student().save_pretrained(tmp_path / "student")
        words = ["--pipeline", base, "--checkpoint", tmp_path / "student", "--student_only"]
        assert app.main([str(word) for word in words]) == 2
        assert re.search(said, capsys.readouterr().err)


def test_a_damaged_vae_trains_caches_and_converts_nothing(tmp_path, capsys):
    base, lost = damaged(TINY / "flux" / "pipeline", tmp_path / "base", "vae")
    data = write_pictures(tmp_path / "data")
    own = [f"paths.pretrained_model={base}", f"paths.dataset={data}"]
    config = "configs/FLUX/flux_senseflow_tiny.yaml"
    assert cache([config, "--output", str(tmp_path / "cache"), "--latents", *own]) == 2
    assert lost in capsys.readouterr().err
    with pytest.raises(ValueError, match=re.escape(lost)):
        begin(configure(data, own[0]), tmp_path / "run")


def test_a_tokenizer_that_is_gone_or_cut_short(sdxl_folder, tmp_path, capsys):
    base = Path(shutil.copytree(sdxl_folder, tmp_path / "base"))
    vocabulary = base / "tokenizer_2" / "tokenizer.json"
    whole_text = vocabulary.read_text()
    for text, said in ((whole_text[:-9], "is not valid JSON"), ("[]", "holds no JSON object")):
        vocabulary.write_text(text)
        assert f"{vocabulary} {said}" in error_of(capsys, SDXL, base, *DRAW, tmp_path)
        with pytest.raises(ValueError, match="tokenizer_2 cannot be read"):
            read_tokenizers(base, None)
    vocabulary.unlink()
    said = f"{base / 'tokenizer_2'} holds no vocabulary"
    assert said in error_of(capsys, SDXL, base, *DRAW, tmp_path)
    with pytest.raises(ValueError, match=said):
        SDXL.text_encoders(settings_of(base, length=None))


# ------------------------------------------------------------------------------ SDXL's "no prompt"


def test_an_empty_prompt_that_is_not_zeros(sdxl_folder, tmp_path):
    """The teacher's images are StableDiffusionXLPipeline's own; so is what training guides with."""
    off = {"force_zeros_for_empty_prompt": False}
    base = changed_copy(sdxl_folder, tmp_path / "base", "model_index.json", **off)
    assert call(SDXL, base, *DRAW, tmp_path / "out") == 0
    stock = StableDiffusionXLPipeline.from_pretrained(base)
    theirs = drawn(stock, 5.0)
    assert grey_levels_apart(only_picture(tmp_path / "out"), theirs) <= 1
    other = drawn(StableDiffusionXLPipeline.from_pretrained(sdxl_folder), 5.0)
    assert grey_levels_apart(theirs, other) > 1
    with torch.no_grad():
        _, embeds, _, pooled = stock.encode_prompt(PROMPTS)
    adapter = SDXL.load_adapter(settings_of(base, length=None), CPU, built)
    null = adapter.null(adapter.encode_prompts(PROMPTS))
    torch.testing.assert_close(null.prompt_embeds, embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(null.pooled, pooled, atol=1e-5, rtol=0)
    assert embeds.abs().max() > 0.1


def test_a_cache_holds_the_null_prompt_of_such_an_sdxl(tmp_path):
    off = {"force_zeros_for_empty_prompt": False}
    base = changed_copy(TINY / "sdxl" / "pipeline", tmp_path / "base", "model_index.json", **off)
    data = write_pictures(tmp_path / "data")
    own = [f"paths.pretrained_model={base}", f"paths.dataset={data}"]
    line = ["configs/sdxl/sdxl_dmd2_tiny.yaml", "--output", tmp_path / "cache", "--prompts", *own]
    assert cache([str(word) for word in line]) == 0
    config = configure(data, own[0], f"paths.cache={tmp_path / 'cache'}", recipe="sdxl_dmd2")
    inputs = read_inputs(config, SDXL)
    nulls = [
        SDXL.load_adapter(inputs.settings, CPU, whole, known).empty
        for known in (None, inputs.cache.prompts)
    ]
    assert torch.equal(nulls[0].prompt_embeds, nulls[1].prompt_embeds)
    assert torch.equal(nulls[0].pooled, nulls[1].pooled)


# ------------------------------------------------------------------------------- SD3.5 without T5


@pytest.fixture(scope="module")
def without_t5(sd35_folder, tmp_path_factory) -> Path:
    """As from_pretrained(text_encoder_3=None, tokenizer_3=None) and save_pretrained leave it."""
    folder = tmp_path_factory.mktemp("t5") / "pipeline"
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        sd35_folder, text_encoder_3=None, tokenizer_3=None
    )
    pipeline.save_pretrained(folder)
    assert not (folder / "tokenizer_3").exists()
    return folder


def stock_without_t5(folder: Path) -> StableDiffusion3Pipeline:
    """diffusers wants to be told that what is null in the index is to stay away."""
    return StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)


def test_sd35_without_t5_draws_as_its_pipeline(without_t5, tmp_path):
    assert call(SD35, without_t5, *DRAW, tmp_path / "teacher") == 0
    stock = stock_without_t5(without_t5)
    theirs = drawn(stock, 4.5, max_sequence_length=256)
    assert grey_levels_apart(only_picture(tmp_path / "teacher"), theirs) <= 1
    CASES["sd35"].student().save_pretrained(tmp_path / "student")
    flags = ["--checkpoint", tmp_path / "student", *SIZE, "--prompt", PROMPTS[0], "--output_dir"]
    assert call(SD35, without_t5, *flags, tmp_path / "out") == 0
    assert only_picture(tmp_path / "out").shape == (24, 32, 3)


def test_sd35_without_t5_is_taught_its_pipelines_encoding(without_t5):
    settings = settings_of(without_t5, length=200)
    SD35.require(settings)
    adapter = SD35.load_adapter(settings, CPU, built)
    cond = adapter.encode_prompts(PROMPTS)
    stock = stock_without_t5(without_t5)
    with torch.no_grad():
        embeds, no_embeds, pooled, no_pooled = stock.encode_prompt(
            PROMPTS, None, None, max_sequence_length=200
        )
    null = adapter.null(cond)
    pairs = [(cond.prompt_embeds, embeds), (cond.pooled, pooled)]
    pairs += [(null.prompt_embeds, no_embeds), (null.pooled, no_pooled)]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert cond.prompt_embeds.shape[1] == 77 + 200


def test_sd35_without_t5_is_trained_and_cached(tmp_path):
    base = Path(shutil.copytree(TINY / "sd35_medium" / "pipeline", tmp_path / "base"))
    index = base / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), **NO_T5}))
    for name in NO_T5:
        shutil.rmtree(base / name)
    data, recipe = write_pictures(tmp_path / "data"), "sd35_senseflow"
    own = [f"paths.pretrained_model={base}", f"paths.dataset={data}"]
    config = "configs/SD35/sd35_senseflow_tiny.yaml"
    line = [config, "--output", str(tmp_path / "cache"), "--prompts", *own]
    assert cache(line) == 0
    cached = f"paths.cache={tmp_path / 'cache'}"
    short = ["train.iter_num=1", "adversarial.kind=none", "isg.weight=0"]
    run = finish(begin(configure(data, own[0], cached, *short, recipe=recipe), tmp_path / "run"))
    assert list((tmp_path / "run" / "student").iterdir()) and run.parts.adapter.empty is not None
    assert [reader.name for reader in read_tokenizers(base, 16)] == ["tokenizer", "tokenizer_2"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tokenizer_3": [None, None]}, "leaves out tokenizer_3, and not text_encoder_3"),
        (NO_T5 | {"text_encoder": [None, None]}, "leaves out text_encoder, which is needed"),
    ],
)
def test_encoders_that_are_needed(changes, said, sd35_folder, tmp_path, capsys):
    base = changed_copy(sd35_folder, tmp_path / "base", "model_index.json", **changes)
    assert said in error_of(capsys, SD35, base, *DRAW, tmp_path)
    with pytest.raises(ValueError, match=said):
        SD35.require(settings_of(base))


# ------------------------------------------------------------------- other models, and other places


def test_sd3_medium_of_2024_is_named(sd35_large_folder, tmp_path, capsys):
    file = "transformer/config.json"
    base = changed_copy(sd35_large_folder, tmp_path / "base", file, qk_norm=None)
    for family in (SD35, SD35_LARGE):
        assert "is SD3 Medium of 2024" in error_of(capsys, family, base, *DRAW, tmp_path)
        with pytest.raises(ValueError, match=r"SD3 Medium of 2024 .* no recipe distils it"):
            family.require(settings_of(base))
    with pytest.raises(ValueError, match=r"SD3 Medium of 2024 .* students of SD3.5 Medium and SD3"):
        family_of(base, "--base")


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("black-forest-labs/FLUX.1-dev", "hf download black-forest-labs/FLUX.1-dev --local-dir"),
        ("models--a--b", "the pipeline in it is {models--a--b/snapshots/abc}"),
        ("flux1-dev.safetensors", "it is a file; load it in diffusers"),
        ("models--a--b/snapshots/abc/transformer", "a part of one, {models--a--b/snapshots/abc}"),
    ],
)
def test_what_is_named_in_place_of_a_pipeline(place, said, flux_folder, tmp_path, capsys):
    snapshots = tmp_path / "models--a--b" / "snapshots"
    shutil.copytree(flux_folder, snapshots / "abc")
    (tmp_path / "flux1-dev.safetensors").touch()
    base = tmp_path / place if (tmp_path / place).exists() else Path(place)
    said = re.sub(r"{(.*)}", rf"{tmp_path}/\1", said)
    family: Family = CASES["flux"].family
    assert said in error_of(capsys, family, base, *DRAW, tmp_path)
    with pytest.raises(ValueError, match=re.escape(said)):
        read_setup(configure(tmp_path, f"paths.pretrained_model={base}"), family)


@pytest.mark.parametrize("file", ["model_index.json", "vae/config.json", "tokenizer_config.json"])
def test_a_byte_order_mark_in_any_json(file, sdxl_folder, tmp_path, capsys):
    base = Path(shutil.copytree(sdxl_folder, tmp_path / "base"))
    (marked,) = (
        base.glob(file) if "/" in file or "index" in file else base.glob(f"tokenizer/{file}")
    )
    marked.write_bytes(b"\xef\xbb\xbf" + marked.read_bytes())
    said = f"{marked} begins with a byte order mark"
    assert said in error_of(capsys, SDXL, base, *DRAW, tmp_path)
    with pytest.raises(ValueError, match=said):
        SDXL.require(settings_of(base, length=None))


def test_a_teacher_of_fp16_variants_is_checked_and_draws(sdxl_folder, tmp_path):
    base = tmp_path / "base"
    stock = StableDiffusionXLPipeline.from_pretrained(sdxl_folder, torch_dtype=torch.float16)
    stock.save_pretrained(base, variant="fp16")
    assert call(SDXL, base, *DRAW, tmp_path / "out") == 0
    again = StableDiffusionXLPipeline.from_pretrained(base, variant="fp16", dtype=torch.float32)
    assert grey_levels_apart(only_picture(tmp_path / "out"), drawn(again, 5.0)) <= 1
    data = write_pictures(tmp_path / "data")
    config = configure(
        data, f"paths.pretrained_model={base}", "train.resolution=[32,32]", recipe="sdxl_dmd2"
    )
    check_teacher(read_inputs(config, RECIPES["sdxl_dmd2"].family))
