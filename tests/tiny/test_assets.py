"""The weights in the repository are those measured, load with the real libraries, and are good."""

import hashlib
import json
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from transformers import AutoTokenizer

from senseflow.tiny.build import TARGETS
from senseflow.tiny.captions import split_scenes
from senseflow.tiny.families import Method, Sampler
from senseflow.tiny.judge import Judge
from senseflow.tiny.measure import measure_row, mixed_prompts
from senseflow.tiny.pictures import draw_scenes, render
from senseflow.tiny.sdxl import with_quant_convs
from senseflow.tiny.vae import encode_images

ASSETS = Path(__file__).parents[2] / "assets" / "tiny"
COMMON = ASSETS / "common"
TEACHERS = ("flux", "sd35_medium", "sd35_large", "sdxl", "flux2_klein", "z_image", "qwen_image")
LONGEST = "a yellow seven left of a purple three on black"


@pytest.fixture(scope="module")
def judge():
    return Judge.load(COMMON / "judge")


@pytest.fixture(scope="module")
def pictures():
    generator = torch.Generator().manual_seed(5)
    scenes = draw_scenes(split_scenes()[1], 16, generator)
    return render(scenes, generator, held_out_scans=True)


@pytest.mark.parametrize("name", [name for name in TARGETS if (ASSETS / name).is_dir()])
def test_checksums(name):
    folder = ASSETS / name
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    recorded = {name: digest for digest, name in (line.split("  ") for line in lines)}
    skipped = {"SHA256SUMS", "README.md"}
    files = [p for p in folder.rglob("*") if p.is_file() and p.name not in skipped]
    found = {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }
    assert found == recorded
    assert sum(path.stat().st_size for path in files) < 8e6
    assert (folder / "README.md").exists()
    assert set(json.loads((folder / "stages.json").read_text())) == set(TARGETS[name])


LATER = ("sd35_medium", "sd35_large", "flux2_klein", "z_image", "qwen_image")
DRAWN = [pytest.param(n, marks=pytest.mark.long if n in LATER else []) for n in TEACHERS]


@pytest.mark.parametrize("name", DRAWN)
def test_the_teacher_draws_what_it_is_asked(name, judge):
    prompts = mixed_prompts(40)
    sampler = Sampler(ASSETS / name / "pipeline", prompts)
    many = Method("teacher", 28, sampler.family.teacher_samplers[0])
    row = measure_row(judge, sampler.draw_seeds(many, num_seeds=1), prompts, {})
    assert row["mean"] > 0.85
    assert row["digits"] > 0.7
    assert row["mean_held_out"] > 0.8


@pytest.mark.parametrize("name", TEACHERS)
def test_captions_fit_every_tokenizer(name):
    for folder in (ASSETS / name / "pipeline").glob("tokenizer*"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = tokenizer(LONGEST).input_ids
        assert len(ids) <= tokenizer.model_max_length
        # what is asked through a chat template has its end from there
        assert tokenizer.chat_template or ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True).split() == LONGEST.split()


def test_sdxl_has_the_common_autoencoder_in_its_own_form(pictures):
    common = AutoencoderKL.from_pretrained(COMMON / "vae")
    shipped = AutoencoderKL.from_pretrained(ASSETS / "sdxl" / "pipeline" / "vae")
    converted = with_quant_convs(common)
    latents = encode_images(common, pictures)
    for vae in (shipped, converted):
        assert vae.config.use_quant_conv and vae.config.use_post_quant_conv
        assert vae.config.shift_factor is None
        with torch.no_grad():
            own = vae.encode(pictures).latent_dist.mode() * vae.config.scaling_factor
            drawn = vae.decode(latents / vae.config.scaling_factor).sample
            factors = common.config.scaling_factor, common.config.shift_factor
            expected = common.decode(latents / factors[0] + factors[1]).sample
        torch.testing.assert_close(own, latents, atol=1e-5, rtol=0)
        torch.testing.assert_close(drawn, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["flux", "sd35_medium", "sd35_large", "z_image"])
def test_flows_hold_the_common_autoencoder(name):
    weights = "diffusion_pytorch_model.safetensors"
    own = (ASSETS / name / "pipeline" / "vae" / weights).read_bytes()
    assert own == (COMMON / "vae" / weights).read_bytes()


def test_flux2_holds_the_common_autoencoder_and_the_statistics_of_its_patches():
    weights = "vae/diffusion_pytorch_model.safetensors"
    common, own = load_file(COMMON / weights), load_file(ASSETS / "flux2_klein/pipeline" / weights)
    assert all(torch.equal(own[name], tensor) for name, tensor in common.items())
    more = own.keys() - common.keys()
    assert more == {f"bn.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}


def test_the_judge_reads_unseen_scans(judge):
    generator = torch.Generator().manual_seed(3)
    scenes = draw_scenes(split_scenes()[1], 300, generator)
    read = judge.attributes(render(scenes, generator, held_out_scans=True))
    assert (read == scenes)[:, :2].double().mean() > 0.95
    assert (read == scenes)[:, 2:].double().mean() > 0.99


def test_timm_loads_the_backbone():
    vit = timm.create_model(f"local-dir:{COMMON / 'dinov2'}", pretrained=True, num_classes=0)
    maps = vit.eval().forward_intermediates(
        torch.zeros(2, 3, 32, 32), indices=[0, 5], norm=False, intermediates_only=True
    )
    assert [tuple(feature.shape) for feature in maps] == [(2, 64, 8, 8)] * 2


def test_open_clip_loads_the_text_tower():
    name = f"local-dir:{COMMON / 'clip'}"
    clip, _, _ = open_clip.create_model_and_transforms(name)
    tokens = open_clip.get_tokenizer(name)(mixed_prompts(40))
    features = clip.eval().encode_text(tokens, normalize=True)
    similarity = features @ features.T - 2 * torch.eye(40)
    assert features.shape == (40, 64)
    assert similarity.max() < 0.999
