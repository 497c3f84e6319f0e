"""Rewards on a few-step student of FLUX.2-klein-base: the recipe of one script.

sh exp_flux2/train_flux2_klein_dancegrpo.sh NODES GPUS CONFIG SAVE_DIR [key.sub=value ...]
"""

from senseflow.config.recipes import RECIPES
from senseflow.launch.entry import main

RECIPE = RECIPES["flux2_klein_dancegrpo"]

if __name__ == "__main__":
    main(RECIPE)
