"""Which YAML each script takes, and the seed's line that gives Medium's to Large."""

import importlib
import inspect
import logging
import re
import runpy
import shutil
from pathlib import Path

import pytest
import yaml

from senseflow.config.config import differences, load_config
from senseflow.config.load import load_recipe
from senseflow.config.recipes import RECIPES

MEDIUM = Path("configs/SD35/sd35_senseflow.yaml")
LARGE = Path("configs/SD35/sd35_large_senseflow.yaml")


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=lambda recipe: recipe.name)
def test_every_recipe_has_its_scripts_module_and_yaml(recipe):
    assert load_recipe(recipe, Path(recipe.config), []) == load_config(recipe.config)
    script = Path(recipe.script).read_text()
    (module,) = re.findall(r"-m (senseflow\.trainer\.trainer_\w+) ", script)
    assert recipe.script in script
    trainer = importlib.import_module(module)
    assert trainer.RECIPE is recipe and "main(RECIPE)" in inspect.getsource(trainer)
    assert recipe.family in runpy.run_path(recipe.draws).values()


def test_large_given_the_yaml_of_medium_keeps_its_paths_and_says_so(tmp_path, caplog):
    """The seed README's line, with a copy of Medium's YAML whose paths the user wrote."""
    tree = yaml.safe_load(MEDIUM.read_text())
    tree["paths"]["pretrained_model"] = "/models/my-large"
    tree["train"]["iter_num"] = 7
    mine = tmp_path / "sd35_senseflow.yaml"
    mine.write_text(yaml.safe_dump(tree))
    caplog.set_level(logging.INFO)
    config = load_recipe(RECIPES["sd35_large_senseflow"], mine, ["train.seed=3"])
    assert config.paths.pretrained_model == "/models/my-large"
    assert config.recipe == "sd35_large_senseflow" and config.train.seed == 3
    assert (config.ida.lam, config.isg.weight, config.fake_score.ttur) == (0.97, 1.0, 5)
    assert config.train.iter_num == load_config(LARGE).train.iter_num
    assert "sd35_senseflow.yaml is the recipe sd35_senseflow: its paths are used" in caplog.text
    assert str(LARGE) in caplog.text


def test_the_embedded_yaml_of_medium_leads_to_the_embedded_one_of_large(tmp_path):
    for name in ("sd35_senseflow_tiny.yaml", "sd35_large_senseflow_tiny.yaml"):
        shutil.copy(MEDIUM.parent / name, tmp_path)
    config = load_recipe(RECIPES["sd35_large_senseflow"], tmp_path / "sd35_senseflow_tiny.yaml", [])
    assert config.train.resolution == (32, 32) and config.ida.lam == 0.97


@pytest.mark.parametrize(
    ("recipe", "file", "script"),
    [
        ("flux_senseflow", MEDIUM, "exp_sd35/train_SD35_senseflow.sh"),
        ("sd35_senseflow", LARGE, "exp_sd35/train_SD35_large_senseflow.sh"),
        ("sdxl_senseflow", Path("configs/sdxl/sdxl_dmd2.yaml"), "exp_sdxl/train_sdxl_dmd2.sh"),
    ],
)
def test_the_yaml_of_another_recipe_is_refused_and_its_script_named(recipe, file, script):
    with pytest.raises(ValueError, match=rf"{file}.*{script}.*this script runs {recipe}"):
        load_recipe(RECIPES[recipe], file, [])


def test_the_wrong_recipe_is_said_before_what_else_does_not_fit():
    with pytest.raises(ValueError, match="this script runs sdxl_senseflow"):
        load_recipe(RECIPES["sdxl_senseflow"], MEDIUM, ["lr_scheduler.warmup_iterations=1000000"])
    with pytest.raises(ValueError, match="lr_scheduler"):
        load_recipe(RECIPES["sd35_senseflow"], MEDIUM, ["lr_scheduler.warmup_iterations=1000000"])


@pytest.mark.parametrize(
    "override", ["lr_scheduler.decay_iterations=99999999", "train.seed=-1", "train.iter_nmu=1"]
)
def test_another_recipe_is_said_before_what_else_is_wrong(override):
    with pytest.raises(ValueError, match=r"is the recipe sd35_senseflow, which sh exp_sd35/"):
        load_recipe(RECIPES["flux_senseflow"], MEDIUM, [override])


def test_a_recipe_keeps_its_own_adversary_or_none():
    file = Path(RECIPES["sdxl_senseflow"].config)
    with pytest.raises(ValueError, match=r"adversarial\.kind bottleneck: sdxl_senseflow has vfm"):
        load_recipe(RECIPES["sdxl_senseflow"], file, ["adversarial.kind=bottleneck"])
    config = load_recipe(RECIPES["sdxl_senseflow"], file, ["adversarial.kind=none"])
    assert config.adversarial.in_use == "none"


@pytest.mark.parametrize(
    ("name", "of", "keys"),
    [
        (
            "FLUX/flux_senseflow_lora_24gb",
            "FLUX/flux_senseflow_lora",
            {"paths.cache", "lora.base", "optimizer.states", "precision.head_masters"},
        ),
        (
            "FLUX2/flux2_klein_senseflow_24gb",
            "FLUX2/flux2_klein_senseflow_lora",
            {"paths.cache", "optimizer.head_states", "precision.head_masters"},
        ),
        (
            "Z-Image/z_image_senseflow_24gb",
            "Z-Image/z_image_senseflow_lora",
            {"paths.cache", "lora.base", "optimizer.head_states", "precision.head_masters"},
        ),
        (
            "Qwen-Image/qwen_image_senseflow_40gb",
            "Qwen-Image/qwen_image_senseflow_lora",
            {"paths.cache", "lora.base", "optimizer.states", "precision.head_masters"},
        ),
        (
            "FLUX/flux_senseflow_48gb",
            "FLUX/flux_senseflow",
            {"optimizer.states", "parallel.recomputation"},
        ),
    ],
)
def test_recipes_for_smaller_cards_change_these_keys_alone(name, of, keys):
    """No loss, no network and no number of the method."""
    ours, other = (load_config(f"configs/{file}.yaml") for file in (name, of))
    assert {line.split(":")[0] for line in differences(ours, other)} == keys
