"""SenseFlow on Stable Diffusion 3.5 Medium: the recipe of one script.

sh exp_sd35/train_SD35_senseflow.sh NODES GPUS CONFIG SAVE_DIR [key.sub=value ...]
"""

from pathlib import Path

from senseflow.config.recipes import Recipe
from senseflow.launch.entry import main
from senseflow.teachers.sd35.family import SD35

RECIPE = Recipe(
    name="sd35_senseflow",
    family=SD35,
    adversary="vfm",
    config=Path("configs/SD35/sd35_senseflow.yaml"),
)

if __name__ == "__main__":
    main("senseflow.trainer.trainer_sd35_senseflow", RECIPE)
