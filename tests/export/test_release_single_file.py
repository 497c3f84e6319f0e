"""One safetensors: diffusers' class reads it, and its names are those that ComfyUI looks for.

What ComfyUI looks for are facts of its comfy/model_detection.py and comfy/utils.py: it tells FLUX,
SD3 and a UNet apart by some keys, and knows the layers by diffusers' names.
"""

import json
import re
from functools import partial
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file
from student_networks import load_network
from students import ANCHORS, save_student

from senseflow.common.files import ROOT, read_json
from senseflow.config.recipes import RECIPES
from senseflow.engine.export import Layout
from senseflow.weights.safetensors_writer import header
from senseflow.weights.stored import Weights, component_weights
from senseflow.weights.student import build_student, find_student

BOTH = "(weight|bias)"
MLP = r"(ff|ff_context)\.net\.(0\.proj|2)"
EMBEDDERS = r"time_text_embed\.(timestep|text|guidance)_embedder\.linear_[12]"
NAMES = {
    "flux": [
        rf"transformer_blocks\.\d+\.attn\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)\.{BOTH}",
        rf"transformer_blocks\.\d+\.(norm1|norm1_context)\.linear\.{BOTH}",
        rf"transformer_blocks\.\d+\.{MLP}\.{BOTH}",
        r"transformer_blocks\.\d+\.attn\.norm_(added_)?[qk]\.weight",
        rf"single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp|proj_out|norm\.linear)\.{BOTH}",
        r"single_transformer_blocks\.\d+\.attn\.norm_[qk]\.weight",
        rf"({EMBEDDERS}|x_embedder|context_embedder|norm_out\.linear|proj_out)\.{BOTH}",
    ],
    "sd35": [
        rf"transformer_blocks\.\d+\.attn\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)\.{BOTH}",
        rf"transformer_blocks\.\d+\.attn2\.(to_[qkv]|to_out\.0)\.{BOTH}",
        rf"transformer_blocks\.\d+\.(norm1|norm1_context)\.linear\.{BOTH}",
        rf"transformer_blocks\.\d+\.{MLP}\.{BOTH}",
        r"transformer_blocks\.\d+\.attn2?\.norm_(added_)?[qk]\.weight",
        rf"({EMBEDDERS}|context_embedder|norm_out\.linear|proj_out|pos_embed\.proj)\.{BOTH}",
        r"pos_embed\.pos_embed",
    ],
}
FULL_SIZE = {"flux": "flux_senseflow", "sd35": "sd35_senseflow"}
ANOTHERS = "joint_transformer_blocks.0.attn.add_k_proj.weight"  # is asked for first


def check_names(family: str, keys: set[str]) -> None:
    """All are known, and the family is told by one that the one before has not."""
    unknown = {key for key in keys if not any(re.fullmatch(name, key) for name in NAMES[family])}
    assert not unknown
    assert ANOTHERS not in keys and not any(key.startswith("double_blocks") for key in keys)
    assert ("x_embedder.weight" in keys) == (family == "flux")
    assert "transformer_blocks.0.attn.add_q_proj.weight" in keys


def full_size(recipe: str) -> dict[str, torch.Tensor]:
    config = dict(RECIPES[recipe].family.published.denoiser)
    with torch.device("meta"):
        return getattr(diffusers, config["_class_name"]).from_config(config).state_dict()


@pytest.mark.parametrize("name", ANCHORS)
def test_one_file_that_diffusers_class_reads(name, tmp_path):
    shipped = save_student(name, tmp_path / "step_0000020")
    out = tmp_path / "four_steps"
    assert shipped.export(out, "--form", "comfyui", "--dtype", "bfloat16") == 0
    assert {f.name for f in out.iterdir()} == {
        "four_steps.safetensors",
        "README.md",
        "senseflow.json",
    }
    state = load_file(out / "four_steps.safetensors")
    network = load_network(shipped.folder)
    wanted = network.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[key], wanted[key].bfloat16()) for key in wanted)
    network.load_state_dict(state, strict=True)
    if shipped.family.name in NAMES:
        check_names(shipped.family.name, set(state))
    found = find_student(out / "four_steps.safetensors")
    assert found.card and found.card.anchors == shipped.anchors


def test_it_is_never_split(tmp_path, monkeypatch):
    """A component of more than a file's size is."""
    monkeypatch.setattr(Layout, "plan", partial(Layout.plan, max_file_size=200_000))
    shipped = save_student("flux", tmp_path / "step_0000020")
    assert shipped.export(tmp_path / "parts") == 0
    assert shipped.export(tmp_path / "one", "--form", "comfyui") == 0
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 3
    assert len(list((tmp_path / "one").glob("*.safetensors"))) == 1


def test_its_tensors_begin_aligned(tmp_path):
    """On 64 bytes where their sizes allow it, so that a mapped file multiplies as one in memory."""
    shipped = save_student("sdxl", tmp_path / "step_0000020")
    assert shipped.export(tmp_path / "out", "--form", "comfyui") == 0
    file = tmp_path / "out" / "out.safetensors"
    begin = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    odd = {key for key, value in load_file(file).items() if value.nbytes % 64}
    places = offsets(file)
    assert begin % 64 == 0 and 0 < len(odd) < len(places) / 2
    assert all((begin + start) % 64 == 0 for key, start in places.items() if key not in odd)
    for length in range(9):
        assert len(header({"x" * length: torch.empty(16)})) % 64 == 0


def test_our_loader_aligns_what_lies_elsewhere():
    """Others' files begin anywhere; the same weights must multiply alike."""
    folder = ROOT / "assets/tiny/flux/pipeline/transformer"
    weights = component_weights(folder)

    def off_by_one(key: str) -> torch.Tensor:
        value = weights.read(key)[...]
        place = torch.empty(value.numel() + 1)[1:].view(value.shape)
        return place.copy_(value)

    config = read_json(folder / "config.json")
    moved = Weights(weights.source, weights.keys, off_by_one)
    network = build_student(moved, config, torch.float32, "config.json")
    assert all(value.data_ptr() % 64 == 0 for value in network.parameters())


def offsets(file: Path) -> dict[str, int]:
    """Where every tensor begins after the header."""
    raw = file.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return {key: value["data_offsets"][0] for key, value in header.items() if key != "__metadata__"}


@pytest.mark.parametrize("family", FULL_SIZE)
def test_comfyui_knows_every_name_of_the_full_size_networks(family):
    check_names(family, set(full_size(FULL_SIZE[family])))


def test_comfyui_takes_the_full_size_unet_for_sdxl():
    """By numbers of blocks and a few widths, counted as its detection counts them."""
    shapes = {key: tuple(value.shape) for key, value in full_size("sdxl_senseflow").items()}
    depth = []
    for block in range(3):
        attentions = count(shapes, f"down_blocks.{block}.attentions.{{}}.")
        for each in range(attentions):
            at = f"down_blocks.{block}.attentions.{each}.transformer_blocks"
            depth.append(count(shapes, f"{at}.{{}}."))
            assert shapes[f"{at}.0.attn2.to_k.weight"][1] == 2048
        if not attentions:
            depth += [0] * count(shapes, f"down_blocks.{block}.resnets.{{}}.")
    assert depth == [0, 0, 2, 2, 10, 10] and count(shapes, "down_blocks.{}.") == 3
    assert shapes["conv_in.weight"][:2] == (320, 4)
    assert shapes["add_embedding.linear_1.weight"][1] == 2816
    assert "class_embedding.linear_1.weight" not in shapes


def count(keys: dict[str, tuple[int, ...]], prefix: str) -> int:
    """How many numbers from 0 on some key begins with."""
    number = 0
    while any(key.startswith(prefix.format(number)) for key in keys):
        number += 1
    return number
