"""SenseFlow on FLUX.1: the recipe of one script.

sh exp_flux/train_flux_senseflow.sh NODES GPUS CONFIG SAVE_DIR [key.sub=value ...]
"""

from pathlib import Path

from senseflow.config.recipes import Recipe
from senseflow.launch.entry import main
from senseflow.teachers.flux.family import FLUX

RECIPE = Recipe(
    name="flux_senseflow",
    family=FLUX,
    adversary="vfm",
    config=Path("configs/FLUX/flux_senseflow.yaml"),
)

if __name__ == "__main__":
    main("senseflow.trainer.trainer_flux_senseflow", RECIPE)
