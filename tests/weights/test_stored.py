"""Which files of a component's folder are read, and what is said of those that cannot be."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModelWithProjection

from senseflow.teachers.text_encoders import PROJECTED_CLIP, text_encoder
from senseflow.weights.filling import whole
from senseflow.weights.meta import component
from senseflow.weights.stored import component_files, component_weights

INDEX = "diffusion_pytorch_model.safetensors.index.json"


def equal(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("sharded", [False, True])
def test_fp16_variants_alone(sharded, sdxl_folder, tmp_path):
    """As diffusers and transformers save them and, with variant="fp16", read them."""
    size = {"max_shard_size": "20KB"} if sharded else {}
    network = UNet2DConditionModel.from_pretrained(sdxl_folder / "unet", dtype=torch.float16)
    network.save_pretrained(tmp_path / "unet", variant="fp16", **size)
    clip = CLIPTextModelWithProjection.from_pretrained(
        sdxl_folder / "text_encoder_2", dtype=torch.float16
    )
    clip.save_pretrained(tmp_path / "clip", variant="fp16", **size)
    assert all("fp16" in file.name for file in tmp_path.glob("*/*.safetensors*"))
    assert (len(component_files(tmp_path / "unet")) > 1) == sharded
    assert equal(whole(component(tmp_path / "unet", torch.float16)), network)
    assert equal(whole(text_encoder(tmp_path / "clip", PROJECTED_CLIP, torch.float16)), clip)


def test_full_weights_come_before_a_variants(sdxl_folder, tmp_path):
    folder = Path(shutil.copytree(sdxl_folder / "vae", tmp_path / "vae"))
    (file,) = component_files(folder)
    shutil.copy(file, folder / "diffusion_pytorch_model.fp16.safetensors")
    assert component_files(folder) == [file]
    shutil.copy(file, folder / "diffusion_pytorch_model.ema.safetensors")
    file.unlink()
    with pytest.raises(ValueError, match="in the variants ema and fp16 alone: leave one"):
        component_weights(folder)


def test_pickles(sdxl_folder, tmp_path):
    network = AutoencoderKL.from_pretrained(sdxl_folder / "vae")
    network.save_pretrained(tmp_path, safe_serialization=False)
    assert [file.suffix for file in component_files(tmp_path)] == [".bin"]
    assert equal(whole(component(tmp_path, torch.float32)), network)
    torch.save({"weights": network.state_dict()}, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="does not hold tensors alone"):
        component_weights(tmp_path)


def test_the_attention_of_an_older_vae(tmp_path):
    """Its names of before diffusers renamed them, which diffusers reads under today's."""
    network = AutoencoderKL(norm_num_groups=4, block_out_channels=(8,))
    network.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = load_file(file)
    for today, before in older.items():
        state = {key.replace(f".{today}.", f".{before}."): value for key, value in state.items()}
    assert sum(".query." in key for key in state) == 4
    save_file(state, file)
    assert equal(AutoencoderKL.from_pretrained(tmp_path), network)
    assert equal(whole(component(tmp_path, torch.float32)), network)


def test_a_lora_that_was_merged_and_not_unloaded(sdxl_folder, tmp_path):
    """As load_lora_weights, fuse_lora and save_pretrained leave a network; diffusers reads such a
    folder with its merged layers at random."""
    network = UNet2DConditionModel.from_pretrained(sdxl_folder / "unet")
    network.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    network.fuse_lora()
    network.save_pretrained(tmp_path / "kept")
    with pytest.raises(ValueError, match=r"unload_lora_weights\(\), then save_pretrained\(\)$"):
        component(tmp_path / "kept", torch.float32)
    network.unload_lora()
    network.save_pretrained(tmp_path / "unloaded")
    assert equal(whole(component(tmp_path / "unloaded", torch.float32)), network)


@pytest.fixture
def shards(sdxl_folder, tmp_path) -> Path:
    folder = tmp_path / "unet"
    network = UNet2DConditionModel.from_pretrained(sdxl_folder / "unet")
    network.save_pretrained(folder, max_shard_size="60KB")
    return folder


def test_shards_without_their_index_or_one_of_them(shards):
    lost = sorted(shards.glob("*.safetensors"))[1]
    there, index = len(component_files(shards)), (shards / INDEX).read_text()
    (shards / INDEX).unlink()
    with pytest.raises(ValueError, match=rf"holds {there} shards, .* not their index \({INDEX}\)"):
        component_weights(shards)
    (shards / INDEX).write_text(index)
    lost.unlink()
    with pytest.raises(ValueError, match=f"{lost} is missing"):
        component_weights(shards)


def test_a_key_that_is_in_no_shard_and_one_of_another_shape(shards):
    tree = json.loads((shards / INDEX).read_text())
    del tree["weight_map"]["conv_in.weight"]
    (shards / INDEX).write_text(json.dumps(tree))
    with pytest.raises(ValueError, match=rf"{shards}.* 1 missing \(conv_in.weight\)"):
        component(shards, torch.float32)
    config = shards / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "conv_in_kernel": 1}))
    with pytest.raises(ValueError, match=r"1 of another shape|1 missing"):
        component(shards, torch.float32)


def test_nothing_is_there(tmp_path):
    with pytest.raises(ValueError, match=rf"no diffusion_pytorch_model or .* in {tmp_path}"):
        component_weights(tmp_path)
    with pytest.raises(ValueError, match=r"config.json not found"):
        component(tmp_path / "none", torch.float32)
