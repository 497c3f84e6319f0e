"""The command line, as careless users type it."""

import subprocess
import sys
from pathlib import Path

import pytest
from statuses import status_of

from senseflow.common.files import ROOT
from senseflow.config.config import load_config
from senseflow.config.recipes import RECIPES
from senseflow.plan.__main__ import build_parser, main, recipe_files
from senseflow.plan.plan import data_of

FLUX = "configs/FLUX/flux_senseflow.yaml"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "CONFIG is missing"),
        (["one.yaml", "--config", "two.yaml"], "one.yaml and two.yaml: one CONFIG"),
        (["--config", "nowhere.yaml"], "config file not found: nowhere.yaml"),
        (["--config", FLUX, "--gpus", "0"], "argument --gpus: 0 must be from 1 to 256"),
        (["--config", FLUX, "--mfu", "40"], "argument --mfu: 40.0 must be above 0 and at most 1"),
        (["--config", FLUX, "--reserve", "90"], "--reserve 90 must be below --memory 80"),
        (["--config", FLUX, "--reserve", "-1"], "argument --reserve: -1.0 must be from 0 to"),
        (["--config", FLUX, "--memory", "4"], "--memory 4 must be above 4, which is kept for"),
        (["--config", FLUX, "--gpus", "1", "--memory", "1.5"], "must be above 1.5, which is kept"),
        (["--config", FLUX, "--fit", "--table"], "--fit is of one configuration, --table of many"),
        (["--config", FLUX, "--output", "plan.txt"], "must end in .md or .json"),
        (["--table", "--output", "plan.json"], "--table is markdown"),
        (["--cards"], "--cards needs --output FILE.md"),
        (["--cards", "--fit", "--config", FLUX, "--output", "cards.md"], "leave out --fit"),
        (["--config", FLUX, "--cards", "--output", "c.md", "ema.decay=null"], "leave out ema.dec"),
        (["--config", FLUX, "train.bath_size=1"], "batch_size"),
        (["--config", FLUX, "--gpus", "3"], "train.batch_size 8 is not a multiple of 3"),
        (["--config", FLUX, "paths.initial=runs/x"], "paths.initial"),
        (
            ["--config", FLUX, "--data", "prompts"],
            "--data prompts has prompts and no images, which",
        ),
        (["--config", FLUX, f"paths.pretrained_model={Path(__file__).parent}"], "model_index.json"),
    ],
)
def test_wrong_input_is_one_line(arguments, words, capsys):
    assert status_of(main, arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and words in error


def test_help_needs_no_torch():
    code = "import sys, senseflow.plan.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_all_recipes_are_those_with_one_sample_on_each_gpu():
    files = recipe_files(build_parser().parse_args(["--table"]))
    assert {ROOT / FLUX, ROOT / "configs/sdxl/sdxl_dmd2.yaml"} < set(files)
    for file in files:
        load_config(file, ["train.batch_size=1", "train.grad_accumulation=1"])


def test_prompts_and_a_cache_that_are_named_are_what_is_planned():
    flux, sdxl = (RECIPES[name] for name in ("flux_senseflow", "sdxl_senseflow"))

    def read(recipe, *overrides):
        return data_of(load_config(ROOT / recipe.config, list(overrides)), recipe)

    assert (read(flux), read(sdxl)) == ("images", "latents")
    assert read(flux, "paths.cache=x") == "cached"
    alone = ("paths.dataset=x.txt", "adversarial.kind=none", "backward_simulation.probability=1")
    for recipe in (flux, sdxl):
        assert (
            read(recipe, *alone) == "prompts" and read(recipe, "paths.cache=x", *alone) == "cached"
        )
        with pytest.raises(ValueError, match=r"paths\.dataset x\.txt has prompts and no images"):
            read(recipe, *alone[:-1])
    for recipe, overrides in ((sdxl, ()), (flux, ("data.crop=random",))):
        with pytest.raises(ValueError, match=r"paths\.cache: .*say --data"):
            read(recipe, "paths.cache=x", *overrides)
