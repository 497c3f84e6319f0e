"""LoRA files of others through the commands: which part is used, and that the rest is said."""

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from students import ours, save_student

from senseflow.common.files import ROOT, read_json
from senseflow.config.families import family_of
from senseflow.sampling.api import load_teacher
from senseflow.sampling.cli import main
from senseflow.teachers.sdxl.original import layer_name

FLUX = ROOT / "assets" / "tiny" / "flux" / "pipeline"
SDXL = ROOT / "assets" / "tiny" / "sdxl" / "pipeline"
TO_Q = "transformer_blocks.0.attn.to_q"


def pair(name: str, inputs: int = 64, outputs: int = 64) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(len(name))
    a, b = (torch.randn(size, generator=draw) for size in ((4, inputs), (outputs, 4)))
    return {f"transformer.{name}.lora_A.weight": a, f"transformer.{name}.lora_B.weight": b}


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A full student, which has no guidance embedding."""
    return save_student("flux", tmp_path_factory.mktemp("full") / "student")


def draw(student, output: Path, *flags: object) -> int:
    words = ["--flux_ckpt", student.base, "--checkpoint", student.folder, "--prompt", "a red seven"]
    return main(student.family, list(map(str, [*words, "--output_dir", output, *flags])))


DEEPER = pair("transformer_blocks.7.attn.to_q") | pair("single_transformer_blocks.30.attn.to_q")


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (
            pair(TO_Q) | DEEPER,
            "2 of its 3 layers fit nowhere (not part of the network: "
            "transformer.single_transformer_blocks.30.attn.to_q, "
            "transformer.transformer_blocks.7.attn.to_q); --lora_partial uses the others",
        ),
        (
            pair(TO_Q) | pair("time_text_embed.guidance_embedder.linear_1", 256),
            "1 of its 2 layers fit nowhere (not part of the network: "
            "transformer.time_text_embed.guidance_embedder.linear_1)",
        ),
        (
            pair(TO_Q, 3072, 3072),
            "has nothing for FLUX.1-dev: 1 of its 1 layers fit nowhere (of an",
        ),
        ({f"transformer.{TO_Q}.lokr_w1": torch.ones(4)}, "of a kind that is not read, LoKr: trans"),
        ({f"{TO_Q}.weight": torch.ones(64, 64)}, f"holds no LoRA: its keys are such as {TO_Q}.wei"),
    ],
    ids=["deeper", "guidance", "wide", "LoKr", "weights"],
)
def test_a_lora_of_which_a_part_fits_nowhere_is_refused(student, tensors, said, tmp_path, capsys):
    save_file(tensors, tmp_path / "a.safetensors")
    assert draw(student, tmp_path / "out", "--lora", tmp_path / "a.safetensors") == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error")]
    assert said in line and not (tmp_path / "out").exists()


def test_a_part_is_used_when_it_is_asked_for(student, tmp_path, capsys):
    save_file(pair(TO_Q), tmp_path / "fits.safetensors")
    save_file(pair(TO_Q) | DEEPER, tmp_path / "deeper.safetensors")
    plain = ours(student, tmp_path / "plain")
    fits = ours(student, tmp_path / "fits", "--lora", tmp_path / "fits.safetensors")
    assert (plain != fits).any()
    words = ["--lora", tmp_path / "deeper.safetensors", "--lora_partial"]
    part = ours(student, tmp_path / "deeper", *words)
    assert (part == fits).all()
    assert "is used in part: 2 of its 3 layers fit nowhere" in capsys.readouterr().err
    for name, num in (("fits", None), ("deeper", 2)):
        (sidecar,) = (tmp_path / name).glob("0*.json")
        assert read_json(sidecar)["lora_unused_layers"] == num
    assert draw(student, tmp_path / "out", "--lora_partial") == 2
    assert "--lora_partial is of a LoRA" in capsys.readouterr().err


def kohya(names: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same adapters at alpha 2 of rank 4, B twice as large."""
    tensors = {}
    for key, value in names.items():
        layer, _, factor = key.removesuffix(".weight").rpartition(".lora_")
        name = "lora_transformer_" + layer.removeprefix("transformer.").replace(".", "_")
        up_or_down, times = {"A": ("down", 1), "B": ("up", 2)}[factor]
        tensors[f"{name}.lora_{up_or_down}.weight"] = value * times
        tensors[f"{name}.alpha"] = torch.tensor(2.0)
    return tensors


def test_a_lora_of_another_form_is_a_student(tmp_path, capsys):
    family = family_of(FLUX, "base")
    images = []
    for name, tensors in (("diffusers", pair(TO_Q)), ("onetrainer", kohya(pair(TO_Q)))):
        save_file(tensors, tmp_path / f"{name}.safetensors")
        words = ["--flux_ckpt", FLUX, "--checkpoint", tmp_path / f"{name}.safetensors"]
        words += ["--prompt", "a red seven", "--height", 32, "--width", 32, "--steps", 1]
        assert main(family, list(map(str, [*words, "--output_dir", tmp_path / name]))) == 0
        (picture,) = (tmp_path / name).glob("0*.png")
        images.append(picture.read_bytes())
    assert images[0] == images[1]
    save_file(pair(TO_Q) | DEEPER, tmp_path / "deeper.safetensors")
    words[3] = tmp_path / "deeper.safetensors"
    assert main(family, list(map(str, [*words, "--output_dir", tmp_path / "out"]))) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "2 of its 3 layers fit nowhere" in said and "; as --lora it is put on top of a" in said


def sdxl_of_kohya() -> dict[str, torch.Tensor]:
    """The UNet by its authors' names, both encoders of CLIP. Every alpha is the same: of others
    diffusers' loader loses those of attention (findings)."""
    base = read_json(SDXL / "unet" / "config.json")
    unet = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    layers = {f"lora_unet_{layer_name(unet, base).replace('.', '_')}": ("unet", f"{unet}.weight")}
    for number, part in ((1, "text_encoder"), (2, "text_encoder_2")):
        for layer in ("self_attn.q_proj", "self_attn.out_proj", "mlp.fc1"):
            path = f"text_model.encoder.layers.0.{layer}"
            layers[f"lora_te{number}_{path.replace('.', '_')}"] = (part, f"{path}.weight")
    tensors, draw = {}, torch.Generator().manual_seed(0)
    for name, (part, key) in layers.items():
        file = next((SDXL / part).glob("*.safetensors"))
        state = {k.removeprefix("text_model."): v for k, v in load_file(file).items()}
        outputs, inputs = state[key.removeprefix("text_model.")].shape
        tensors[f"{name}.lora_down.weight"] = torch.randn(4, inputs, generator=draw)
        tensors[f"{name}.lora_up.weight"] = torch.randn(outputs, 4, generator=draw)
        tensors[f"{name}.alpha"] = torch.tensor(2.0)
    return tensors


def deltas(stock: DiffusionPipeline) -> dict[str, torch.Tensor]:
    return {
        f"{part}.{name}": module.get_delta_weight(next(iter(module.lora_A)))
        for part in ("unet", "text_encoder", "text_encoder_2")
        for name, module in getattr(stock, part).named_modules()
        if isinstance(module, LoraLayer)
    }


def test_text_encoders_get_their_part_as_by_diffusers(tmp_path):
    save_file(sdxl_of_kohya(), tmp_path / "kohya.safetensors")
    mine = deltas(load_teacher(SDXL, lora=tmp_path / "kohya.safetensors").stock)
    stock = DiffusionPipeline.from_pretrained(SDXL)
    stock.load_lora_weights(tmp_path, weight_name="kohya.safetensors")
    theirs = deltas(stock)
    assert mine.keys() == theirs.keys() and len(mine) == 7
    for key, delta in mine.items():
        torch.testing.assert_close(delta, theirs[key])
