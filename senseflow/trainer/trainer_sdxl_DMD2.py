"""DMD2 on SDXL: the recipe of one script.

    sh exp_sdxl/train_sdxl_dmd2.sh NODES GPUS CONFIG SAVE_DIR [key.sub=value ...]

No IDA, no ISG; the adversary is a classifier on the bottleneck of the fake score.
"""

from pathlib import Path

from senseflow.config.recipes import Recipe
from senseflow.launch.entry import main
from senseflow.teachers.sdxl.family import SDXL

RECIPE = Recipe(
    name="sdxl_dmd2",
    family=SDXL,
    adversary="bottleneck",
    config=Path("configs/sdxl/sdxl_dmd2.yaml"),
)

if __name__ == "__main__":
    main("senseflow.trainer.trainer_sdxl_DMD2", RECIPE)
