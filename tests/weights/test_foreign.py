"""Weights as other programs keep them: read, said, or refused with what they are and what to do."""

import json
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from student_networks import load_network

from senseflow.common.files import ROOT
from senseflow.sampling.cli import main
from senseflow.sampling.drawing import Paths
from senseflow.sampling.model import find_model
from senseflow.teachers.flux.family import FLUX

BASE = ROOT / "assets/tiny/flux/pipeline"
CONFIG = BASE / "transformer" / "config.json"
RESHAPED = "x_embedder.weight"
E4M3 = torch.float8_e4m3fn


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return load_file(BASE / "transformer" / "diffusion_pytorch_model.safetensors")


def check_same(file: Path, wanted: dict[str, torch.Tensor]) -> None:
    state = load_network(file, CONFIG).state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[key], wanted[key]) for key in wanted)


def test_fp8_is_read_and_said(state, tmp_path, caplog):
    low = {key: value.to(E4M3) for key, value in state.items()}
    save_file(low, tmp_path / "fp8.safetensors")
    check_same(tmp_path / "fp8.safetensors", {key: value.float() for key, value in low.items()})
    assert "fp8.safetensors is in 8 bits (fp8)" in caplog.text


@pytest.mark.parametrize("scale", ["scale_weight", "weight_scale"])
def test_comfyuis_scaled_fp8_is_multiplied_out(scale, state, tmp_path):
    """ComfyUI's scaled files: fp8 weights, a float32 scale for each, marks of how they are used."""
    held, wanted = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    for key, value in state.items():
        layer = key.removesuffix(".weight")
        if layer == key or value.dim() != 2:
            held[key] = wanted[key] = value
            continue
        factor = value.abs().max() / 448
        held[key], held[f"{layer}.{scale}"] = (value / factor).to(E4M3), factor
        wanted[key] = held[key].float() * factor
        if scale == "weight_scale":
            mark = json.dumps({"format": "float8_e4m3fn"}).encode()
            held[f"{layer}.comfy_quant"] = torch.tensor(list(mark), dtype=torch.uint8)
    if scale == "scale_weight":
        held["scaled_fp8"] = torch.zeros(2).to(E4M3)
    save_file(held, tmp_path / "scaled.safetensors")
    check_same(tmp_path / "scaled.safetensors", wanted)


def test_gguf_is_what_diffusers_makes_of_it(state, tmp_path, caplog, capsys):
    gguf = pytest.importorskip("gguf")
    from diffusers.models.model_loading_utils import load_gguf_checkpoint
    from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

    file = tmp_path / "student.gguf"
    writer = gguf.GGUFWriter(str(file), "flux")
    for key, value in state.items():
        low = value.dim() == 2 and value.shape[1] % 32 == 0
        kind = gguf.GGMLQuantizationType.Q8_0 if low else gguf.GGMLQuantizationType.F32
        if key == RESHAPED:  # into rows of whole blocks, as converters for ComfyUI do
            writer.add_array(f"comfy.gguf.orig_shape.{key}", tuple(value.shape))
            value = value.reshape(-1, 256)
        writer.add_tensor(key, gguf.quantize(value.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    theirs = load_gguf_checkpoint(str(file))
    wanted = {
        key: dequantize_gguf_tensor(value).float() if hasattr(value, "quant_type") else value
        for key, value in theirs.items()
    }
    assert wanted[RESHAPED].shape[1] == 256
    wanted[RESHAPED] = wanted[RESHAPED].view(state[RESHAPED].shape)
    state = load_network(file, CONFIG).state_dict()
    assert state.keys() == wanted.keys()
    for key, value in wanted.items():  # theirs is in float16
        torch.testing.assert_close(state[key], value, rtol=2**-10, atol=2**-14)
    assert "student.gguf is in few bits (Q8_0)" in caplog.text
    file.write_bytes(file.read_bytes()[:100])
    assert "student.gguf cannot be read" in refusal(file, capsys)


def refusal(checkpoint: Path | str, capsys: pytest.CaptureFixture[str]) -> str:
    """What the sampling script says of a checkpoint that it does not take, in one line."""
    words = ["--flux_ckpt", BASE, "--checkpoint", checkpoint, "--prompt", "x"]
    assert main(FLUX, [*map(str, words), "--output_dir", "/nowhere"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: ")
    return said


def test_gguf_without_its_package_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gguf", None)
    (tmp_path / "q.gguf").write_bytes(b"GGUF\3\0\0\0")
    assert "pip install gguf" in refusal(tmp_path / "q.gguf", capsys)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["transformer.transformer_blocks.0.attn.to_q.lora_down.weight"], "as --lora it is put on"),
        (["proj_out.weight", "proj_out.weight.absmax"], "is quantized (bitsandbytes)"),
        (["proj_out.weight", "proj_out.SCB"], "is quantized (bitsandbytes)"),
        (["proj_out.weight._data", "proj_out.weight._scale"], "is quantized (optimum-quanto)"),
        (["proj_out.weight", "proj_out.weight_scale_2"], "is quantized (NVFP4)"),
        (["proj_out.qweight", "proj_out.wscales"], "is quantized (SVDQuant or GPTQ)"),
        (["double_blocks.0.img_mod.lin.weight"], "in the original names of Black Forest Labs: "),
        (["double_blocks.0.img_attn.qkv.weight"], "in the original names of Black Forest Labs: "),
        (["img_in.weight", "proj_out.weight"], "in the original names of Black Forest Labs: "),
        (["joint_blocks.0.x_block.attn.qkv.weight"], "of a SD3Transformer2DModel; FLUX.1-dev has"),
        (["label_emb.0.0.weight"], "of a UNet2DConditionModel; FLUX.1-dev has"),
    ],
)
def test_what_is_not_read_is_named(keys, said, tmp_path, capsys):
    save_file({key: torch.zeros(2, 2) for key in keys}, tmp_path / "x.safetensors")
    assert said in refusal(tmp_path / "x.safetensors", capsys)


def test_a_strangers_lora_is_drawn_with_a_word_on_where_it_belongs(tmp_path, caplog):
    """Kohya's names; without a card nothing says that it is a student."""
    layer = "lora_unet_double_blocks_0_img_attn_proj"
    held = {f"{layer}.lora_down.weight": torch.zeros(4, 64), f"{layer}.alpha": torch.tensor(4.0)}
    save_file({**held, f"{layer}.lora_up.weight": torch.zeros(64, 4)}, tmp_path / "x.safetensors")
    model = find_model(FLUX, Paths(BASE, tmp_path / "x.safetensors"))
    assert model.student and "one that is no student goes to --lora" in caplog.text


@pytest.mark.parametrize(
    ("mark", "said"),
    [
        ('{"format": "mxfp8"}', "is quantized (ComfyUI's 'mxfp8')"),
        ("[1]", "is quantized (ComfyUI's '[1]')"),
        ("[" * 5000, "x.safetensors, a.comfy_quant is not valid JSON: it is nested too deeply"),
        ("{", "x.safetensors, a.comfy_quant is not valid JSON"),
    ],
)
def test_comfyuis_other_few_bits_are_named(mark, said, tmp_path, capsys):
    mark = torch.tensor(list(mark.encode()), dtype=torch.uint8)
    held = {"a.weight": torch.zeros(2, 2), "a.weight_scale": torch.ones(2), "a.comfy_quant": mark}
    save_file(held, tmp_path / "x.safetensors")
    assert said in refusal(tmp_path / "x.safetensors", capsys)


@pytest.mark.parametrize("name", ["state_dict", "module", "generator"])
def test_pickles_of_other_trainers(name, state, tmp_path):
    torch.save({name: state, "step": 3}, tmp_path / "student.ckpt")
    check_same(tmp_path / "student.ckpt", state)


def test_a_pickle_of_torchao_is_named(tmp_path, monkeypatch, capsys):
    """Its tensors are of its own classes, which torch does not read without their code."""
    theirs = types.ModuleType("torchao")
    theirs.Tensor = type("Tensor", (), {"__module__": "torchao", "__qualname__": "Tensor"})
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torchao", theirs)
        torch.save({"proj_out.weight": theirs.Tensor()}, tmp_path / "x.bin")
    assert "x.bin is quantized (torchao)" in refusal(tmp_path / "x.bin", capsys)


def test_places_of_the_hub_are_known(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = refusal("domiso/SenseFlow", capsys)
    assert "`hf download domiso/SenseFlow --local-dir DIR`" in said
    snapshot = tmp_path / "models--domiso--SenseFlow" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    said = refusal(snapshot.parents[1], capsys)
    assert "a folder of the Hub's cache" in said and str(snapshot) in said
