"""SenseFlow on Stable Diffusion 3.5 Large: the recipe of one script.

    sh exp_sd35/train_SD35_large_senseflow.sh NODES GPUS CONFIG SAVE_DIR [key.sub=value ...]

Given the YAML of Medium, it says so, keeps its paths and trains with Large's own numbers.
"""

from pathlib import Path

from senseflow.engine.launch import main
from senseflow.engine.recipe import Recipe
from senseflow.models.sd35 import SD35_LARGE, is_medium

RECIPE = Recipe(
    name="sd35_large_senseflow",
    family=SD35_LARGE,
    adversary="vfm",
    config=Path("configs/SD35/sd35_large_senseflow.yaml"),
    lends_paths="sd35_senseflow",
    is_lenders=is_medium,
)

if __name__ == "__main__":
    main("senseflow.trainer.trainer_sd35_large_senseflow", RECIPE)
