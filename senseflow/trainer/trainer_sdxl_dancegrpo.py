"""Rewards on a few-step student of SDXL: the recipe of one script.

sh exp_sdxl/train_sdxl_dancegrpo.sh NODES GPUS CONFIG SAVE_DIR [key.sub=value ...]
"""

from senseflow.config.recipes import RECIPES
from senseflow.launch.entry import main

RECIPE = RECIPES["sdxl_dancegrpo"]

if __name__ == "__main__":
    main(RECIPE)
