"""A LoRA student: beside its teacher as a LoRA, or fused into a pipeline or one file."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from students import Shipped, ours, run_script, save_student, script_of

from senseflow.extract_lora import __main__ as extract_lora
from senseflow.weights.card import read_card, write_card
from senseflow.weights.lora_files import METADATA
from senseflow.weights.stored import LORA_FILE

TARGETS = ["to_q", "proj_mlp", "ff.net.2"]
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def network() -> FluxTransformer2DModel:
    """The embedded teacher with an adapter of scale 2."""
    base = "assets/tiny/flux/pipeline/transformer"
    network = FluxTransformer2DModel.from_pretrained(base)
    torch.manual_seed(0)
    network.add_adapter(
        LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights=False)
    )
    return network


@pytest.fixture(scope="module")
def shipped(network, tmp_path_factory) -> Shipped:
    """As diffusers saves it, alpha in the header."""
    full = save_student("flux", tmp_path_factory.mktemp("full") / "student", guidance=3.5)
    folder = tmp_path_factory.mktemp("lora") / "step_0000020"
    folder.mkdir()
    state = get_peft_model_state_dict(network)
    facts = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS}
    header = {METADATA: json.dumps({f"transformer.{k}": v for k, v in facts.items()})}
    tensors = {f"transformer.{key}": value.contiguous() for key, value in state.items()}
    save_file(tensors, folder / LORA_FILE, header)
    write_card(folder, read_card(full.folder))
    return Shipped(folder, full.base, full.family, full.anchors)


def test_beside_its_teacher(shipped, tmp_path, monkeypatch):
    """The file with its scale in B, and the card's script draws our image with it."""
    out = tmp_path / "lora"
    assert shipped.export(out, "--form", "lora", "--base_model", shipped.base) == 0
    mine, theirs = (load_file(folder / LORA_FILE) for folder in (out, shipped.folder))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[k], theirs[k] * (2 if "lora_B" in k else 1)) for k in mine)
    data = ModelCard.load(out / "README.md").data.to_dict()
    assert data["base_model_relation"] == "adapter" and data["guidance_scale"] == 3.5
    picture, _ = run_script(script_of(out), out, monkeypatch)
    assert np.array_equal(picture, ours(shipped, tmp_path / "ours"))


@pytest.mark.parametrize("form", ["pipeline", "comfyui"])
def test_fused(form, shipped, network, tmp_path):
    """W + 2 B A of every target, all else the teacher's; peft's own fusion."""
    assert shipped.export(tmp_path / "out", "--form", form) == 0
    file = Path("transformer", WEIGHTS) if form == "pipeline" else Path("out.safetensors")
    state = load_file(tmp_path / "out" / file)
    base = load_file(shipped.base / "transformer" / WEIGHTS)
    adapted = get_peft_model_state_dict(network)
    assert state.keys() == base.keys()
    moved = 0
    for key, value in base.items():
        layer = key.removesuffix(".weight")
        if f"{layer}.lora_A.weight" in adapted and key.endswith(".weight"):
            a, b = (adapted[f"{layer}.lora_{factor}.weight"] for factor in "AB")
            value, moved = value + 2 * b @ a, moved + 1
        torch.testing.assert_close(state[key], value, rtol=1e-6, atol=1e-6)
    assert moved == len(adapted) / 2 > 10


def test_fused_weights_are_rounded_once(shipped, network, tmp_path):
    """W + 2 B A in bfloat16 from factors in float32."""
    assert shipped.export(tmp_path / "out", "--form", "comfyui", "--dtype", "bfloat16") == 0
    state = load_file(tmp_path / "out" / "out.safetensors")
    base = load_file(shipped.base / "transformer" / WEIGHTS)
    adapted = {k: v.double() for k, v in get_peft_model_state_dict(network).items()}
    layers = {key.rpartition(".lora_")[0] for key in adapted}
    wrong = total = 0
    for layer in layers:
        a, b = (adapted[f"{layer}.lora_{factor}.weight"] for factor in "AB")
        exact = (base[f"{layer}.weight"].double() + 2 * b @ a).bfloat16()
        wrong += int((state[f"{layer}.weight"] != exact).sum())
        total += exact.numel()
    assert wrong < 1e-3 * total


def test_a_fused_pipeline_draws_our_image(shipped, tmp_path, monkeypatch):
    """But for rounding: a sum of two products is not the product of a sum."""
    out = tmp_path / "out"
    assert shipped.export(out, "--form", "pipeline") == 0
    index = json.loads((out / "transformer" / "config.json").read_text())
    assert index["guidance_embeds"]
    picture, _ = run_script(script_of(out), out, monkeypatch)
    mine = ours(shipped, tmp_path / "ours")
    assert np.abs(picture.astype(int) - mine).max() <= 1


def test_a_full_student_is_no_lora(tmp_path, capsys):
    full = save_student("flux", tmp_path / "student")
    assert full.export(tmp_path / "out", "--form", "lora") == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "was trained in full: python -m senseflow.extract_lora --base" in said


def test_a_rank_beyond_every_layer_is_said_before_its_zeros_are_written(tmp_path, capsys):
    full = save_student("flux", tmp_path / "student")
    words = ["--base", full.base, "--student", full.folder, "--rank", 50_000]
    words += ["--output", tmp_path / "out"]
    assert extract_lora.main(list(map(str, words))) == 2
    assert "--rank 50000: no layer has a rank above" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["student"]


def test_adapters_of_other_layers(shipped, tmp_path, capsys):
    folder = tmp_path / "odd"
    folder.mkdir()
    state = {"transformer.nothing.lora_A.weight": torch.zeros(4, 8)}
    state["transformer.nothing.lora_B.weight"] = torch.zeros(8, 4)
    save_file(state, folder / LORA_FILE)
    write_card(folder, read_card(shipped.folder))
    odd = Shipped(folder, shipped.base, shipped.family, shipped.anchors)
    assert odd.export(tmp_path / "out", "--form", "pipeline") == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "1 of its 1 layers fit nowhere (not part of the network: transformer.nothing)" in said
    assert not (tmp_path / "out").exists()
