"""Weights replaced under the same name: images made with the old ones are not taken for new."""

import json
import shutil

import diffusers
import pytest
from command_line import PROMPTS, call, error_of, only_picture
from doc_programs import Program, parser_of
from flux_pipeline import transformer
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file

from senseflow.config.recipes import RECIPES
from senseflow.sampling import generate
from senseflow.sampling.generate import write_shot
from senseflow.sampling.job import Prompt, missing_shots, prompt_shot
from senseflow.teachers.flux.family import FLUX
from senseflow.weights.card import StudentCard, write_card
from senseflow.weights.fingerprint import fingerprint
from senseflow.weights.student import find_student


def change(file) -> None:
    """Other numbers in the same file, of the same size."""
    state = load_file(file)
    size = file.stat().st_size
    save_file({key: value + 1 for key, value in state.items()}, file, {"format": "pt"})
    assert file.stat().st_size == size


@pytest.fixture
def made(flux_folder, tmp_path):
    """A base, a student trained on it and a LoRA, with the flags that draw an image of these."""
    base = shutil.copytree(flux_folder, tmp_path / "base")
    network = transformer(guidance_embeds=False)
    folder = tmp_path / "run" / "student" / "step_0000020"
    network.save_pretrained(folder)
    card = StudentCard("flux", (1.0, 0.7), 24, 32, None, 12, "base", "0" * 64, 20)
    write_card(folder, card)
    network.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    lora = tmp_path / "lora"
    diffusers.FluxPipeline.save_lora_weights(lora, get_peft_model_state_dict(network))
    flags = ["--checkpoint", tmp_path / "run", "--lora", lora, "--prompt", PROMPTS[0]]
    return tmp_path, base, [*flags, "--output_dir", tmp_path / "out"]


@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("run/student/step_0000020/diffusion_pytorch_model.safetensors", "checkpoint_weights"),
        ("lora/pytorch_lora_weights.safetensors", "lora_weights"),
        ("base/vae/diffusion_pytorch_model.safetensors", "base_weights"),
    ],
)
def test_a_repeat_with_replaced_weights_is_refused_by_name(file, key, made, capsys):
    folder, base, flags = made
    assert call(FLUX, base, *flags) == 0
    before = only_picture(folder / "out")
    assert call(FLUX, base, *flags) == 0  # nothing was replaced yet
    change(folder / file)
    said = error_of(capsys, FLUX, base, *flags)
    assert f"made with other settings ({key} " in said and "--overwrite" in said
    if key == "checkpoint_weights":
        assert call(FLUX, base, *flags, "--overwrite") == 0
        assert (only_picture(folder / "out") != before).any()


def test_every_shard_of_a_student_counts(tmp_path):
    transformer(guidance_embeds=False).save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    parts = find_student(tmp_path).parts
    assert len(shards) > 1 and sorted(parts[1:]) == shards
    assert parts[0].name == "diffusion_pytorch_model.safetensors.index.json"
    first = fingerprint(parts)
    change(shards[-1])
    assert fingerprint(find_student(tmp_path).parts) != first


def test_an_old_image_never_lies_beside_a_new_sidecar(tmp_path, monkeypatch):
    """The process dies between the sidecar and the image."""
    shot = prompt_shot(tmp_path, Prompt(0, "a fox"), 0)
    image = Image.new("RGB", (4, 4))
    write_shot(shot, image, {"steps": 4})

    def killed(image, file):
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "save_whole", killed)
    with pytest.raises(KeyboardInterrupt):
        write_shot(shot, image, {"steps": 1})
    assert json.loads(shot.sidecar.read_text())["steps"] == 1 and not shot.file.exists()
    monkeypatch.undo()
    assert missing_shots([shot], {"steps": 1}, set()) == [shot]
    write_shot(shot, image, {"steps": 1})
    assert Image.open(shot.file).size == (4, 4)


def test_images_of_another_family_are_said_in_short(tmp_path):
    """All five commands of the released code draw the same prompts into ./outputs."""
    shot = prompt_shot(tmp_path, Prompt(0, "a red fox"), 0)
    Image.new("RGB", (8, 8)).save(shot.file)
    flux = {"family": "flux", "base": "/a/" + "long" * 40, "checkpoint": "/b/" + "long" * 40}
    shot.sidecar.write_text(json.dumps({"prompt": "a red fox", "seed": 0, **flux}))
    sdxl = {key: f"other {value}" for key, value in flux.items()} | {"family": "sdxl"}
    with pytest.raises(ValueError) as error:
        missing_shots([shot], sdxl, set())
    assert str(error.value) == (
        f"{shot.file} is there already, made with other settings (family flux, now sdxl): choose "
        "another --output_dir, or --overwrite"
    )
    with pytest.raises(ValueError, match=r"settings \(base .*, now .*, checkpoint [^(]*\): choose"):
        missing_shots([shot], {**sdxl, "family": "flux", "steps": 4, "height": 8}, set())


def test_each_recipe_has_a_folder_by_default():
    scripts = [Program("script", recipe.draws) for recipe in RECIPES.values()]
    folders = [str(parser_of(script).get_default("output_dir")) for script in scripts]
    scripts = {recipe.draws for recipe in RECIPES.values()}  # recipes with rewards share theirs
    assert len(set(folders)) == len(scripts) and {"outputs/sdxl", "outputs/sdxl_dmd2"} <= {*folders}
