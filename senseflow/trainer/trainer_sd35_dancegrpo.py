"""Rewards on a few-step student of SD3.5 Medium: the recipe of one script.

sh exp_sd35/train_SD35_dancegrpo.sh NODES GPUS CONFIG SAVE_DIR [key.sub=value ...]
"""

from senseflow.config.recipes import RECIPES
from senseflow.launch.entry import main

RECIPE = RECIPES["sd35_dancegrpo"]

if __name__ == "__main__":
    main(RECIPE)
