"""Weights files that are holes, and a folder made of the published configurations."""

import json
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from senseflow.common.files import ROOT
from senseflow.config.sections import PathsConfig
from senseflow.distill.vfm_features import FrozenBackbone
from senseflow.plan.fakes import Loading, fake_whole
from senseflow.plan.memo import Memo
from senseflow.plan.stand_in import (
    SHARD,
    copy_teacher,
    fill,
    write_holes,
    write_shards,
    write_vision,
)
from senseflow.teachers.flux.family import FLUX
from senseflow.teachers.sd35.family import SD35
from senseflow.teachers.text_encoders import PROJECTED_CLIP, text_encoder
from senseflow.weights.stored import component_weights


def test_a_hole_has_names_types_and_shapes_and_takes_no_room(tmp_path):
    wanted = {
        "a": torch.empty(30_000, 10_000, device="meta", dtype=torch.bfloat16),
        "b": torch.empty((), device="meta"),
        "c": torch.empty(3, device="meta", dtype=torch.int64),
    }
    file = tmp_path / "model.safetensors"
    write_holes(file, wanted)
    weights = component_weights(tmp_path)
    weights.require(wanted)
    assert file.stat().st_size > 600e6 and 512 * file.stat().st_blocks < 2**20
    assert weights.read("c")[...].dtype == torch.int64
    assert weights.read("a")[slice(10, 12)].shape == (2, 10_000)


def test_weights_too_large_to_be_mapped_at_once_are_in_several_files(tmp_path):
    half = torch.empty(SHARD // 4, device="meta", dtype=torch.bfloat16)
    wanted = {"a": half, "b": half.view(-1, 2), "c": half, "d": half[:3]}
    write_shards(tmp_path, "model", wanted)
    files = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    assert sorted(f.name for f in tmp_path.glob("*.safetensors")) == files
    component_weights(tmp_path).require(wanted)
    (tmp_path / "small").mkdir()
    write_shards(tmp_path / "small", "model", {"d": wanted["d"]})
    assert [f.name for f in (tmp_path / "small").iterdir()] == ["model.safetensors"]


def test_an_encoder_reads_what_was_made_up_for_it(tmp_path):
    trees = SD35.published.files("StableDiffusion3Pipeline", "transformer")
    keep = ("text_encoder/config.json", "tokenizer/tokenizer_config.json", "model_index.json")
    for name in keep:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps(trees[name]))
    for entry in ("text_encoder_2", "text_encoder_3", "tokenizer_2", "tokenizer_3"):
        trees["model_index.json"].pop(entry)
    (tmp_path / "model_index.json").write_text(json.dumps(trees["model_index.json"]))
    fill(tmp_path, [PROJECTED_CLIP])
    source = text_encoder(tmp_path / "text_encoder", PROJECTED_CLIP, torch.bfloat16)
    assert sum(p.numel() for p in source.network.parameters()) == 123_650_304


def test_a_copy_of_a_folder_keeps_its_small_files_and_no_weights(tmp_path):
    source = ROOT / "assets/tiny/flux/pipeline"
    copy_teacher(source, tmp_path, FLUX)
    for file in source.rglob("*"):
        own = tmp_path / file.relative_to(source)
        assert own.exists(), own
        if file.suffix == ".json":
            assert own.read_bytes() == file.read_bytes()
    held = component_weights(tmp_path / "transformer")
    assert sorted(held.keys) == sorted(component_weights(source / "transformer").keys)
    assert not held.read(held.keys[0])[...].any()


def test_nothing_of_the_source_is_written(tmp_path):
    source = ROOT / "assets/tiny/flux/pipeline"
    before = {f: f.stat().st_mtime_ns for f in Path(source).rglob("*")}
    copy_teacher(source, tmp_path, FLUX)
    assert before == {f: f.stat().st_mtime_ns for f in Path(source).rglob("*")}


def test_a_dinov3_is_made_up_and_costs_what_arithmetic_says(tmp_path):
    """1024 px are 64 x 64 patches of 16, a CLS token and four registers."""
    name = "vit_small_patch16_dinov3.lvd1689m"
    paths = PathsConfig("teacher", "data", dinov2=name, clip="local-dir:clip")
    (override,) = write_vision(tmp_path, paths)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    file = override.removeprefix("paths.dinov2_weights=")
    with mode, Loading(Memo()):
        backbone = FrozenBackbone(name, (2, 11), checkpoint=file, dtype=torch.bfloat16)
    fake_whole([backbone], mode)
    with mode, FlopCounterMode(display=False) as counted:
        features = backbone(torch.empty(1, 3, 1024, 1024))
    assert [f.shape for f in features] == [(1, 384, 64, 64)] * 3
    patches, tokens, width = 64 * 64, 64 * 64 + 5, 384
    block = (
        24 * tokens * width**2 + 4 * tokens**2 * width
    )  # linear layers; attention's two products
    assert counted.get_total_flops() == 12 * block + 2 * patches * 3 * 16**2 * width
