"""SenseFlow on Stable Diffusion 3.5 Medium: the recipe of one script.

sh exp_sd35/train_SD35_senseflow.sh NODES GPUS CONFIG SAVE_DIR [key.sub=value ...]
"""

from pathlib import Path

from senseflow.engine.launch import main
from senseflow.engine.recipe import Recipe
from senseflow.models.sd35 import SD35

RECIPE = Recipe(
    name="sd35_senseflow",
    family=SD35,
    adversary="vfm",
    config=Path("configs/SD35/sd35_senseflow.yaml"),
)

if __name__ == "__main__":
    main("senseflow.trainer.trainer_sd35_senseflow", RECIPE)
