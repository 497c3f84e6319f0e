"""DMD2 on SDXL: the recipe of one script.

    sh exp_sdxl/train_sdxl_dmd2.sh NODES GPUS CONFIG SAVE_DIR [key.sub=value ...]

No IDA, no ISG; the adversary is a classifier on the bottleneck of the fake score.
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
    name="sdxl_dmd2",
    open_family=open_family,
    adversary="bottleneck",
    config=Path("configs/sdxl/sdxl_dmd2.yaml"),
)

if __name__ == "__main__":
    main("senseflow.trainer.trainer_sdxl_DMD2", RECIPE)
