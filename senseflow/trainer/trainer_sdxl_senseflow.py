"""SenseFlow on SDXL: the recipe of one script.

sh exp_sdxl/train_sdxl_senseflow.sh NODES GPUS CONFIG SAVE_DIR [key.sub=value ...]
"""

from pathlib import Path
from typing import TYPE_CHECKING

from senseflow.config.recipes import Recipe
from senseflow.launch.entry import main

if TYPE_CHECKING:
    from senseflow.teachers.teacher import TeacherFamily


def open_family() -> "TeacherFamily":
    """The architecture of the teacher."""
    from senseflow.teachers.sdxl.adapter import SDXL  # diffusers, seconds

    return SDXL


RECIPE = Recipe(
    name="sdxl_senseflow",
    open_family=open_family,
    adversary="vfm",
    config=Path("configs/sdxl/sdxl_senseflow.yaml"),
)

if __name__ == "__main__":
    main("senseflow.trainer.trainer_sdxl_senseflow", RECIPE)
