"""A network in the names of its authors' files and back: what diffusers reads is the component."""

import dataclasses
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from students import Shipped, ours, save_student
from teacher_parts import settings_of

from senseflow.config.recipes import RECIPES
from senseflow.engine.initial import begun_with, open_initial
from senseflow.export.source import find_source, in_original_names
from senseflow.extract_lora.__main__ import main as extract_lora
from senseflow.sampling.cli import main
from senseflow.weights.meta import meta_network
from senseflow.weights.original import inverse, planned, to_diffusers

FULL_SIZE = (
    *("flux_senseflow", "sd35_senseflow", "sd35_large_senseflow", "sdxl_senseflow"),
    "flux2_klein_senseflow",
    "z_image_senseflow",
    "qwen_image_senseflow",
)
NUM_TENSORS = {"flux": 780, "sdxl": 1680}  # in the published files' headers
TRUE_SHAPES = {  # of some tensors in the published files, those that hold several of diffusers'
    "flux": {
        "double_blocks.18.img_attn.qkv.weight": (9216, 3072),
        "double_blocks.0.txt_attn.norm.key_norm.scale": (128,),
        "single_blocks.37.linear1.weight": (21504, 3072),
        "single_blocks.0.linear2.weight": (3072, 15360),
        "guidance_in.in_layer.weight": (3072, 256),
        "final_layer.adaLN_modulation.1.weight": (6144, 3072),
    },
    "sd35": {
        "pos_embed": (1, 147456, 1536),
        "joint_blocks.12.x_block.attn2.qkv.weight": (4608, 1536),
        "joint_blocks.12.x_block.adaLN_modulation.1.weight": (13824, 1536),
        "joint_blocks.23.context_block.adaLN_modulation.1.weight": (3072, 1536),
    },
    "z_image": {
        "layers.29.attention.qkv.weight": (11520, 3840),
        "noise_refiner.1.adaLN_modulation.0.weight": (15360, 256),
        "x_embedder.weight": (3840, 64),
        "cap_embedder.1.weight": (3840, 2560),
    },
    "qwen_image": {  # called alike
        "transformer_blocks.59.attn.add_q_proj.weight": (3072, 3072),
        "transformer_blocks.0.img_mod.1.weight": (18432, 3072),
        "txt_in.weight": (3072, 3584),
        "proj_out.weight": (64, 3072),
    },
    "sdxl": {
        "input_blocks.4.1.transformer_blocks.1.attn2.to_k.weight": (640, 2048),
        "input_blocks.6.0.op.weight": (640, 640, 3, 3),
        "middle_block.1.transformer_blocks.9.ff.net.0.proj.weight": (10240, 1280),
        "output_blocks.2.2.conv.weight": (1280, 1280, 3, 3),
        "output_blocks.8.0.skip_connection.weight": (320, 640, 1, 1),
        "label_emb.0.0.weight": (1280, 2816),
    },
    "flux2": {  # by the released module, not by a file's header
        "double_blocks.4.img_attn.qkv.weight": (9216, 3072),
        "double_blocks.0.txt_mlp.0.weight": (18432, 3072),
        "double_stream_modulation_img.lin.weight": (18432, 3072),
        "single_blocks.19.linear1.weight": (27648, 3072),
        "single_blocks.0.norm.key_norm.scale": (128,),
        "final_layer.adaLN_modulation.1.weight": (6144, 3072),
    },
}  # fmt: skip


@pytest.mark.parametrize("recipe", FULL_SIZE)
def test_every_tensor_at_full_size_has_its_place(recipe):
    """By diffusers' own conversion of names and shapes; no weights are needed."""
    family = RECIPES[recipe].family
    network = meta_network(
        getattr(diffusers, family.network_class), dict(family.published.denoiser)
    )
    config, own = dict(network.config), network.state_dict()
    plan = to_diffusers(
        network, lambda key: family.original.name(key, config), family.original.prefix
    )
    back = inverse(plan)
    held = planned(back, own.__getitem__)
    shapes = {key: held(key).shape for key in back}
    assert len(shapes) == NUM_TENSORS.get(family.name, len(shapes))
    if recipe != "sd35_large_senseflow":
        assert TRUE_SHAPES[family.name].items() <= shapes.items()
    assert sum(s.numel() for s in shapes.values()) == sum(v.numel() for v in own.values())
    there = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    again = planned(plan, there.__getitem__)
    assert all(again(key).shape == value.shape for key, value in own.items())


def exported(shipped: Shipped, folder: Path) -> Path:
    """The single file of a student in its authors' names."""
    assert shipped.export(folder, "--form", "original") == 0
    names = {f.name for f in folder.iterdir()}
    assert names == {f"{folder.name}.safetensors", "README.md", "senseflow.json"}
    return folder / f"{folder.name}.safetensors"


def from_single_file(file: Path, network_class: str, config: Path) -> torch.nn.Module:
    return getattr(diffusers, network_class).from_single_file(str(file), config=str(config))


def check_same(theirs: torch.nn.Module, component: Path) -> None:
    state, own = theirs.state_dict(), load_file(component / "diffusion_pytorch_model.safetensors")
    assert state.keys() == own.keys()
    assert all(torch.equal(state[key], own[key]) for key in own)


@pytest.mark.parametrize("name", ["sd35_medium", "sd35_large", "sdxl"])
def test_diffusers_reads_the_component_bit_for_bit(name, tmp_path):
    shipped = save_student(name, tmp_path / "step_0000020")
    file = exported(shipped, tmp_path / "out")
    keys = load_file(file).keys()
    assert all(key.startswith("model.diffusion_model.") for key in keys)
    check_same(from_single_file(file, shipped.family.network_class, shipped.folder), shipped.folder)


def test_flux_as_black_forest_labs_name_cut_and_join_it(tmp_path):
    """diffusers reads FLUX at its true width alone; the embedded one by the rules, written out."""
    shipped = save_student("flux", tmp_path / "step_0000020")
    theirs = load_file(exported(shipped, tmp_path / "out"))
    own = load_file(shipped.folder / "diffusion_pytorch_model.safetensors")
    double, single = "transformer_blocks.1.", "single_transformer_blocks.2."
    for kind in ("weight", "bias"):
        for name, parts in {
            "double_blocks.1.img_attn.qkv": [f"{double}attn.to_{p}" for p in "qkv"],
            "double_blocks.1.txt_attn.qkv": [f"{double}attn.add_{p}_proj" for p in "qkv"],
            "double_blocks.1.txt_mlp.2": [f"{double}ff_context.net.2"],
            "single_blocks.2.linear1": [
                *(f"{single}attn.to_{p}" for p in "qkv"),
                f"{single}proj_mlp",
            ],
            "single_blocks.2.modulation.lin": [f"{single}norm.linear"],
            "vector_in.out_layer": ["time_text_embed.text_embedder.linear_2"],
        }.items():
            joined = torch.cat([own[f"{part}.{kind}"] for part in parts])
            assert torch.equal(theirs[f"{name}.{kind}"], joined), name
        scale, shift = own[f"norm_out.linear.{kind}"].chunk(2)
        joined = torch.cat([shift, scale])
        assert torch.equal(theirs[f"final_layer.adaLN_modulation.1.{kind}"], joined)
    norm = theirs["single_blocks.2.norm.key_norm.scale"]
    assert torch.equal(norm, own[f"{single}attn.norm_k.weight"])
    assert not any("guidance" in key for key in theirs)


@pytest.mark.long
def test_flux_at_its_true_width(tmp_path):
    """One block of each kind at width 3072, in bfloat16: 1 GB."""
    config = dict(
        RECIPES["flux_senseflow"].family.published.denoiser,
        num_layers=1, num_single_layers=1, joint_attention_dim=64, guidance_embeds=False,
    )  # fmt: skip
    small = save_student("flux", tmp_path / "small")
    with torch.device("meta"):
        network = diffusers.FluxTransformer2DModel.from_config(config).to(torch.bfloat16)
    network.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for value in network.parameters():
        value.data.uniform_(-1, 1, generator=generator)
    network.save_pretrained(tmp_path / "step_0000020")
    card = small.folder / "senseflow.json"
    (tmp_path / "step_0000020" / "senseflow.json").write_bytes(card.read_bytes())
    shipped = Shipped(tmp_path / "step_0000020", small.base, small.family, small.anchors)
    file = exported(shipped, tmp_path / "out")
    theirs = diffusers.FluxTransformer2DModel.from_single_file(
        str(file), config=str(shipped.folder), dtype=torch.bfloat16
    )
    check_same(theirs, shipped.folder)


@pytest.mark.parametrize("name", ["flux", "sd35_medium", "sdxl"])
def test_its_checkpoint_draws_the_same_image(name, tmp_path):
    """As it was exported; FLUX as ComfyUI saves it, all names behind one prefix, beside a VAE."""
    shipped = save_student(name, tmp_path / "step_0000020")
    file = exported(shipped, tmp_path / "out")
    if name == "flux":
        state = {f"model.diffusion_model.{key}": value for key, value in load_file(file).items()}
        save_file({**state, "first_stage_model.conv_in.weight": torch.zeros(1)}, file)
    original = Shipped(file, shipped.base, shipped.family, shipped.anchors)
    theirs = ours(original, tmp_path / "original")
    assert np.array_equal(theirs, ours(shipped, tmp_path / "own"))


def test_what_does_not_fit_is_named_by_the_files_own_names(tmp_path, capsys):
    shipped = save_student("sd35_medium", tmp_path / "step_0000020")
    file = exported(shipped, tmp_path / "out")
    state = load_file(file)
    prefix = "model.diffusion_model."
    del state[f"{prefix}joint_blocks.0.x_block.attn.proj.bias"]
    state[f"{prefix}x_embedder.proj.bias"] = torch.zeros(3)
    save_file({**state, f"{prefix}stranger": torch.zeros(1)}, file)
    words = [shipped.family.base_flag, shipped.base, "--checkpoint", file, "--prompt", "x"]
    assert main(shipped.family, [*map(str, words), "--output_dir", str(tmp_path / "images")]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert (
        "in the original names of Stability AI: 1 missing (joint_blocks.0.x_block.attn.proj.bias)"
        in said
    )
    assert "1 not part of the network (stranger)" in said
    assert "1 of another shape (x_embedder.proj.bias [3], not [64])" in said


def test_what_was_exported_is_exported_again(tmp_path):
    """The single file and its card stand for the student: its component has the same weights."""
    shipped = save_student("flux", tmp_path / "step_0000020")
    exported(shipped, tmp_path / "out")
    again = Shipped(tmp_path / "out", shipped.base, shipped.family, shipped.anchors)
    assert again.export(tmp_path / "again") == 0
    own, theirs = (
        load_file(folder / "diffusion_pytorch_model.safetensors")
        for folder in (shipped.folder, tmp_path / "again")
    )
    assert own.keys() == theirs.keys() and all(torch.equal(own[key], theirs[key]) for key in own)


def test_other_commands_read_it_too(tmp_path):
    """extract_lora, and a run that begins with it: as from the component."""
    shipped = save_student("sd35_medium", tmp_path / "step_0000020")
    file = exported(shipped, tmp_path / "out")
    loras = []
    for student, name in ((shipped.folder, "a"), (file, "b")):
        words = ["--base", shipped.base, "--student", student, "--rank", 1]
        assert extract_lora([*map(str, words), "--output", str(tmp_path / name)]) == 0
        loras.append((tmp_path / name / "pytorch_lora_weights.safetensors").read_bytes())
    assert loras[0] == loras[1]
    own = load_file(shipped.folder / "diffusion_pytorch_model.safetensors")
    source = shipped.family.student(settings_of(shipped.base, resolution=(32, 32)))
    begun = begun_with(open_initial(file), "generator", shipped.family, source)
    assert all(torch.equal(begun.read(key)[...], value) for key, value in own.items())


def test_a_family_of_no_other_names_says_so(tmp_path):
    shipped = save_student("flux", tmp_path / "step_0000020")
    source = find_source(shipped.folder, shipped.base, ema=False, dtype=None)
    family = dataclasses.replace(shipped.family, original=None)
    with pytest.raises(ValueError, match=r"--form original: FLUX\.1-dev has no names but"):
        in_original_names(dataclasses.replace(source, family=family))
