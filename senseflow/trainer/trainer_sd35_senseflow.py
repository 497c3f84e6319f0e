"""SenseFlow on Stable Diffusion 3.5 Medium: the recipe of one script.

sh exp_sd35/train_SD35_senseflow.sh NODES GPUS CONFIG SAVE_DIR [key.sub=value ...]
"""

from pathlib import Path
from typing import TYPE_CHECKING

from senseflow.config.recipes import Recipe
from senseflow.launch.entry import main

if TYPE_CHECKING:
    from senseflow.teachers.teacher import TeacherFamily


def open_family() -> "TeacherFamily":
    """The architecture of the teacher."""
    from senseflow.teachers.sd35.adapter import SD35  # diffusers, seconds

    return SD35


RECIPE = Recipe(
    name="sd35_senseflow",
    open_family=open_family,
    adversary="vfm",
    config=Path("configs/SD35/sd35_senseflow.yaml"),
)

if __name__ == "__main__":
    main("senseflow.trainer.trainer_sd35_senseflow", RECIPE)
