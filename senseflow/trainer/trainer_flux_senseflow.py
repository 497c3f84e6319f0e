"""SenseFlow on FLUX.1: the recipe of one script.

sh exp_flux/train_flux_senseflow.sh NODES GPUS CONFIG SAVE_DIR [key.sub=value ...]
"""

from pathlib import Path
from typing import TYPE_CHECKING

from senseflow.config.recipes import Recipe
from senseflow.launch.entry import main

if TYPE_CHECKING:
    from senseflow.teachers.teacher import TeacherFamily


def open_family() -> "TeacherFamily":
    """The architecture of the teacher."""
    from senseflow.teachers.flux.adapter import FLUX  # diffusers, seconds

    return FLUX


RECIPE = Recipe(
    name="flux_senseflow",
    open_family=open_family,
    adversary="vfm",
    config=Path("configs/FLUX/flux_senseflow.yaml"),
)

if __name__ == "__main__":
    main("senseflow.trainer.trainer_flux_senseflow", RECIPE)
