"""SenseFlow on Stable Diffusion 3.5 Large: the recipe of one script.

    sh exp_sd35/train_SD35_large_senseflow.sh NODES GPUS CONFIG SAVE_DIR [key.sub=value ...]

Given the YAML of Medium, it says so, keeps its paths and trains with Large's own numbers.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from senseflow.config.recipes import Recipe
from senseflow.launch.entry import main

if TYPE_CHECKING:
    from senseflow.teachers.teacher import TeacherFamily


def open_family() -> "TeacherFamily":
    """The architecture of the teacher."""
    from senseflow.teachers.sd35.adapter import SD35_LARGE  # diffusers, seconds

    return SD35_LARGE


def is_lenders(folder: Path) -> bool:
    """Whether a teacher is Medium."""
    from senseflow.teachers.sd35.adapter import is_medium  # diffusers, seconds

    return is_medium(folder)


RECIPE = Recipe(
    name="sd35_large_senseflow",
    open_family=open_family,
    adversary="vfm",
    config=Path("configs/SD35/sd35_large_senseflow.yaml"),
    lends_paths="sd35_senseflow",
    is_lenders=is_lenders,
)

if __name__ == "__main__":
    main("senseflow.trainer.trainer_sd35_large_senseflow", RECIPE)
