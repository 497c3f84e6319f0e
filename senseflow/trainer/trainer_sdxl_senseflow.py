"""SenseFlow on SDXL: the recipe of one script.

sh exp_sdxl/train_sdxl_senseflow.sh NODES GPUS CONFIG SAVE_DIR [key.sub=value ...]
"""

from pathlib import Path

from senseflow.engine.launch import main
from senseflow.engine.recipe import Recipe
from senseflow.models.sdxl import SDXL

RECIPE = Recipe(
    name="sdxl_senseflow",
    family=SDXL,
    adversary="vfm",
    config=Path("configs/sdxl/sdxl_senseflow.yaml"),
)

if __name__ == "__main__":
    main("senseflow.trainer.trainer_sdxl_senseflow", RECIPE)
