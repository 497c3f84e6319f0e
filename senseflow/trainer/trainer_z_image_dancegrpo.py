"""Rewards on a few-step student of Z-Image: the recipe of one script.

sh exp_z_image/train_z_image_dancegrpo.sh NODES GPUS CONFIG SAVE_DIR [key.sub=value ...]
"""

from senseflow.config.recipes import RECIPES
from senseflow.launch.entry import main

RECIPE = RECIPES["z_image_dancegrpo"]

if __name__ == "__main__":
    main(RECIPE)
