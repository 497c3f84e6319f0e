"""SenseFlow on SDXL: the recipe of one script.

sh exp_sdxl/train_sdxl_senseflow.sh NODES GPUS CONFIG SAVE_DIR [key.sub=value ...]
"""

from pathlib import Path

from senseflow.config.recipes import Recipe
from senseflow.launch.entry import main
from senseflow.teachers.sdxl.family import SDXL

RECIPE = Recipe(
    name="sdxl_senseflow",
    family=SDXL,
    adversary="vfm",
    config=Path("configs/sdxl/sdxl_senseflow.yaml"),
)

if __name__ == "__main__":
    main("senseflow.trainer.trainer_sdxl_senseflow", RECIPE)
