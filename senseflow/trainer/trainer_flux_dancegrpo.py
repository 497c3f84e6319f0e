"""Rewards on a few-step student of FLUX.1: the recipe of one script.

sh exp_flux/train_flux_dancegrpo.sh NODES GPUS CONFIG SAVE_DIR [key.sub=value ...]
"""

from senseflow.config.recipes import RECIPES
from senseflow.launch.entry import main

RECIPE = RECIPES["flux_dancegrpo"]

if __name__ == "__main__":
    main(RECIPE)
