"""The weights in the repository are those measured, load with the real libraries, and are good."""

import hashlib
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from diffusers import FluxPipeline

from senseflow.tiny.captions import split_scenes
from senseflow.tiny.judge import Judge
from senseflow.tiny.measure import Method, Sampler, measure_row, mixed_prompts
from senseflow.tiny.pictures import draw_scenes, render
from senseflow.tiny.text import T5_LENGTH

FOLDER = Path(__file__).parents[2] / "assets" / "tiny" / "flux"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def pipeline():
    loaded = FluxPipeline.from_pretrained(FOLDER / "pipeline")
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def judge():
    return Judge.load(FOLDER / "judge")


def test_checksums():
    lines = (FOLDER / "SHA256SUMS").read_text().splitlines()
    recorded = {name: digest for digest, name in (line.split("  ") for line in lines)}
    skipped = {"SHA256SUMS", "README.md"}
    files = [p for p in FOLDER.rglob("*") if p.is_file() and p.name not in skipped]
    found = {
        str(path.relative_to(FOLDER)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }
    assert found == recorded
    assert sum(path.stat().st_size for path in files) < 8e6


@pytest.mark.parametrize(
    ("num_steps", "sigmas"),
    [(4, [1, 0.9045, 0.7595, 0.5128, 0]), (2, [1, 0.7595, 0]), (1, [1, 0])],
)
def test_few_steps_are_the_anchors(pipeline, num_steps, sigmas):
    pipeline(
        "a red seven left of a blue two on white",
        num_inference_steps=num_steps,
        height=32,
        width=32,
        max_sequence_length=T5_LENGTH,
        output_type="latent",
    )
    torch.testing.assert_close(
        pipeline.scheduler.sigmas, torch.tensor(sigmas).float(), atol=5e-5, rtol=0
    )


def test_captions_fit_both_tokenizers(pipeline):
    longest = "a yellow seven left of a purple three on black"
    clip, t5 = (t(longest).input_ids for t in (pipeline.tokenizer, pipeline.tokenizer_2))
    assert len(clip) == 12 <= pipeline.tokenizer_max_length
    assert len(t5) == 11 <= T5_LENGTH
    assert pipeline.tokenizer_2.unk_token_id not in t5


def test_the_teacher_draws_what_it_is_asked(pipeline, judge):
    prompts = mixed_prompts(100)
    sampler = Sampler(pipeline, {"teacher": pipeline.transformer}, prompts, guidance=3.5)
    pictures = sampler.draw_seeds(Method("teacher", 28), num_seeds=1)
    row = measure_row(judge, pictures, prompts, {})
    assert row["mean"] > 0.95
    assert row["digits"] > 0.9
    assert row["mean_held_out"] > 0.93


def test_the_judge_reads_unseen_scans(judge):
    generator = torch.Generator().manual_seed(3)
    scenes = draw_scenes(split_scenes()[1], 300, generator)
    read = judge.attributes(render(scenes, generator, held_out_scans=True))
    assert (read == scenes)[:, :2].double().mean() > 0.95
    assert (read == scenes)[:, 2:].double().mean() > 0.99


def test_timm_loads_the_backbone():
    vit = timm.create_model(f"local-dir:{FOLDER / 'dinov2'}", pretrained=True, num_classes=0)
    maps = vit.eval().forward_intermediates(
        torch.zeros(2, 3, 32, 32), indices=[0, 5], norm=False, intermediates_only=True
    )
    assert [tuple(feature.shape) for feature in maps] == [(2, 64, 8, 8)] * 2


def test_open_clip_loads_the_text_tower():
    name = f"local-dir:{FOLDER / 'clip'}"
    clip, _, _ = open_clip.create_model_and_transforms(name)
    tokens = open_clip.get_tokenizer(name)(mixed_prompts(40))
    features = clip.eval().encode_text(tokens, normalize=True)
    similarity = features @ features.T - 2 * torch.eye(40)
    assert features.shape == (40, 64)
    assert similarity.max() < 0.999
