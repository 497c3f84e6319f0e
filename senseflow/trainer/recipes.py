"""The five recipes by name, for commands that take any of them."""

from senseflow.config.recipes import Recipe
from senseflow.trainer import (
    trainer_flux_senseflow,
    trainer_sd35_large_senseflow,
    trainer_sd35_senseflow,
    trainer_sdxl_DMD2,
    trainer_sdxl_senseflow,
)

TRAINERS = (
    trainer_flux_senseflow,
    trainer_sdxl_senseflow,
    trainer_sdxl_DMD2,
    trainer_sd35_senseflow,
    trainer_sd35_large_senseflow,
)
RECIPES: dict[str, Recipe] = {trainer.RECIPE.name: trainer.RECIPE for trainer in TRAINERS}
