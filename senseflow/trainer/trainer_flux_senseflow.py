"""SenseFlow on FLUX.1: the recipe of one script.

sh exp_flux/train_flux_senseflow.sh NODES GPUS CONFIG SAVE_DIR [key.sub=value ...]
"""

from senseflow.config.recipes import RECIPES
from senseflow.launch.entry import main

RECIPE = RECIPES["flux_senseflow"]

if __name__ == "__main__":
    main(RECIPE)
