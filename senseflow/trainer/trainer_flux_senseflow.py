"""SenseFlow on FLUX.1: the recipe of one script.

sh exp_flux/train_flux_senseflow.sh NODES GPUS CONFIG SAVE_DIR [key.sub=value ...]
"""

from pathlib import Path

from senseflow.engine.launch import main
from senseflow.engine.recipe import Recipe
from senseflow.models.flux import FLUX

RECIPE = Recipe(
    name="flux_senseflow",
    family=FLUX,
    adversary="vfm",
    config=Path("configs/FLUX/flux_senseflow.yaml"),
)

if __name__ == "__main__":
    main("senseflow.trainer.trainer_flux_senseflow", RECIPE)
