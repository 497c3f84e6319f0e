"""DMD2 on SDXL: the recipe of one script.

    sh exp_sdxl/train_sdxl_dmd2.sh NODES GPUS CONFIG SAVE_DIR [key.sub=value ...]

No IDA, no ISG; the adversary is a classifier on the bottleneck of the fake score.
"""

from senseflow.config.recipes import RECIPES
from senseflow.launch.entry import main

RECIPE = RECIPES["sdxl_dmd2"]

if __name__ == "__main__":
    main(RECIPE)
