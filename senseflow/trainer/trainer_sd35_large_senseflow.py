"""SenseFlow on Stable Diffusion 3.5 Large: the recipe of one script.

    sh exp_sd35/train_SD35_large_senseflow.sh NODES GPUS CONFIG SAVE_DIR [key.sub=value ...]

Given the YAML of Medium, it says so, keeps its paths and trains with Large's own numbers.
"""

from senseflow.config.recipes import RECIPES
from senseflow.launch.entry import main

RECIPE = RECIPES["sd35_large_senseflow"]

if __name__ == "__main__":
    main(RECIPE)
