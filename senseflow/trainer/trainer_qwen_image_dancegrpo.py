"""Rewards on a few-step student of Qwen-Image: the recipe of one script.

sh exp_qwen_image/train_qwen_image_dancegrpo.sh NODES GPUS CONFIG SAVE_DIR [key.sub=value ...]
"""

from senseflow.config.recipes import RECIPES
from senseflow.launch.entry import main

RECIPE = RECIPES["qwen_image_dancegrpo"]

if __name__ == "__main__":
    main(RECIPE)
