"""The recipes: which teacher each distils and the files that are its own; to add one is a line.

Light: command lines read the table before torch is imported.
"""

import difflib
from dataclasses import dataclass
from typing import Literal

from senseflow.teachers.family import Family
from senseflow.teachers.flux.family import FLUX
from senseflow.teachers.flux2.family import FLUX2
from senseflow.teachers.qwen_image.family import QWEN_IMAGE
from senseflow.teachers.sd35.family import SD35, SD35_LARGE
from senseflow.teachers.sdxl.family import SDXL
from senseflow.teachers.z_image.family import Z_IMAGE


@dataclass(frozen=True)
class Method:
    """What a student is credited to."""

    title: str
    paper: str


SENSEFLOW = Method("SenseFlow", "https://arxiv.org/abs/2506.00523")
DMD2 = Method("DMD2", "https://arxiv.org/abs/2405.14867")


@dataclass(frozen=True)
class Recipe:
    """What a training script runs; files are named from the root of the repository."""

    name: str  # that its YAMLs say under `recipe`
    family: Family  # of its teacher
    adversary: Literal["vfm", "bottleneck"]  # besides none
    configs: str  # the folder of its published YAML, which has its name
    script: str  # sh SCRIPT trains
    sampler: str | None = None  # draws with its students; None: the family's script
    lends_paths: str | None = None  # the recipe whose YAML only lends its paths to this one

    @property
    def config(self) -> str:
        """Its published YAML, relative to the repository's root."""
        return f"{self.configs}/{self.name}.yaml"

    @property
    def method(self) -> Method:
        """The classifier on the bottleneck of the fake score is DMD2's."""
        return DMD2 if self.adversary == "bottleneck" else SENSEFLOW

    @property
    def draws(self) -> str:
        """The script that draws with its students."""
        return self.sampler or self.family.script


_TABLE = (
    Recipe("flux_senseflow", FLUX, "vfm", "configs/FLUX", "exp_flux/train_flux_senseflow.sh"),
    Recipe("sdxl_senseflow", SDXL, "vfm", "configs/sdxl", "exp_sdxl/train_sdxl_senseflow.sh"),
    Recipe("sdxl_dmd2", SDXL, "bottleneck", "configs/sdxl", "exp_sdxl/train_sdxl_dmd2.sh",
           sampler="scripts_sdxl/test_sdxl_dmd2.py"),
    Recipe("sd35_senseflow", SD35, "vfm", "configs/SD35", "exp_sd35/train_SD35_senseflow.sh"),
    Recipe("sd35_large_senseflow", SD35_LARGE, "vfm", "configs/SD35",
           "exp_sd35/train_SD35_large_senseflow.sh", lends_paths="sd35_senseflow"),
    Recipe("flux2_klein_senseflow", FLUX2, "vfm", "configs/FLUX2",
           "exp_flux2/train_flux2_klein_senseflow.sh"),
    Recipe("z_image_senseflow", Z_IMAGE, "vfm", "configs/Z-Image",
           "exp_z_image/train_z_image_senseflow.sh"),
    Recipe("qwen_image_senseflow", QWEN_IMAGE, "vfm", "configs/Qwen-Image",
           "exp_qwen_image/train_qwen_image_senseflow.sh"),
    Recipe("flux_dancegrpo", FLUX, "vfm", "configs/FLUX", "exp_flux/train_flux_dancegrpo.sh"),
    Recipe("sdxl_dancegrpo", SDXL, "vfm", "configs/sdxl", "exp_sdxl/train_sdxl_dancegrpo.sh"),
    Recipe("sd35_dancegrpo", SD35, "vfm", "configs/SD35", "exp_sd35/train_SD35_dancegrpo.sh"),
    Recipe("flux2_klein_dancegrpo", FLUX2, "vfm", "configs/FLUX2",
           "exp_flux2/train_flux2_klein_dancegrpo.sh"),
    Recipe("z_image_dancegrpo", Z_IMAGE, "vfm", "configs/Z-Image",
           "exp_z_image/train_z_image_dancegrpo.sh"),
    Recipe("qwen_image_dancegrpo", QWEN_IMAGE, "vfm", "configs/Qwen-Image",
           "exp_qwen_image/train_qwen_image_dancegrpo.sh"),
)  # fmt: skip
RECIPES = {recipe.name: recipe for recipe in _TABLE}
FAMILIES = tuple(dict.fromkeys(recipe.family for recipe in _TABLE))


def require_recipe(name: str) -> None:
    """Raise ValueError for a name that is no recipe's."""
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1, cutoff=0.0)[0]
        raise ValueError(f"recipe: {name!r} is none of {', '.join(RECIPES)}; the nearest is {near}")
