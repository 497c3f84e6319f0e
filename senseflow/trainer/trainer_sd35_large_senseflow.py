"""SenseFlow on Stable Diffusion 3.5 Large: the recipe of one script.

    sh exp_sd35/train_SD35_large_senseflow.sh NODES GPUS CONFIG SAVE_DIR [key.sub=value ...]

Given the YAML of Medium, it says so, keeps its paths and trains with Large's own numbers.
"""

from pathlib import Path

from senseflow.config.recipes import Recipe
from senseflow.launch.entry import main
from senseflow.teachers.sd35.family import SD35_LARGE

RECIPE = Recipe(
    name="sd35_large_senseflow",
    family=SD35_LARGE,
    adversary="vfm",
    config=Path("configs/SD35/sd35_large_senseflow.yaml"),
    lends_paths="sd35_senseflow",
)

if __name__ == "__main__":
    main("senseflow.trainer.trainer_sd35_large_senseflow", RECIPE)
