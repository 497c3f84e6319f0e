"""The five published recipes: which teacher family each distils, and how its YAML is read."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from senseflow.common.files import ROOT
from senseflow.config.config import Config, load_config
from senseflow.teachers.family import Family

logger = logging.getLogger(__name__)

SCRIPTS = {
    "flux_senseflow": "exp_flux/train_flux_senseflow.sh",
    "sdxl_senseflow": "exp_sdxl/train_sdxl_senseflow.sh",
    "sdxl_dmd2": "exp_sdxl/train_sdxl_dmd2.sh",
    "sd35_senseflow": "exp_sd35/train_SD35_senseflow.sh",
    "sd35_large_senseflow": "exp_sd35/train_SD35_large_senseflow.sh",
}


@dataclass(frozen=True)
class Recipe:
    """What a training script runs."""

    name: str
    family: Family  # of its teacher
    adversary: str  # besides "none"
    config: Path  # its published YAML, from the root of the repository
    lends_paths: str | None = None  # the recipe whose YAML only lends its paths to this one

    def load(self, file: Path, overrides: list[str]) -> Config:
        """The configuration in `file` with `key.sub=value` overrides.

        A YAML of the recipe `lends_paths` gives its paths alone (and not its own kind of teacher);
        all numbers are those of this recipe's own YAML beside it. Raises ValueError for a YAML of
        any other recipe, and for another adversary than this recipe's.
        """
        config, read = load_config(file, overrides), file
        if self.lends_paths and config.recipe == self.lends_paths:
            read = self._beside(file)
            own, paths = load_config(read, overrides), config.paths
            if not self.family.is_this_size(Path(paths.pretrained_model)):
                logger.info("paths.pretrained_model is %s's: taking this recipe's", config.recipe)
                paths = replace(paths, pretrained_model=own.paths.pretrained_model)
            config = replace(own, paths=paths)
            logger.info(
                "%s is the recipe %s: its paths are used, and the numbers of %s",
                file,
                self.lends_paths,
                read,
            )
        if config.recipe != self.name:
            raise ValueError(
                f"{read} is the recipe {config.recipe}, which sh {SCRIPTS[config.recipe]} runs; "
                f"this script runs {self.name}"
            )
        if config.adversarial.in_use not in (self.adversary, "none"):
            raise ValueError(
                f"{file}: adversarial.kind {config.adversarial.kind}: {self.name} has "
                f"{self.adversary} or none"
            )
        return config

    def _beside(self, file: Path) -> Path:
        """This recipe's YAML next to that of `lends_paths`, else the published one."""
        assert self.lends_paths
        own = file.with_name(file.name.replace(self.lends_paths, self.name))
        return own if own != file and own.is_file() else ROOT / self.config


def check_split(config: Config, world_size: int) -> None:
    """The global batch must divide over processes and micro-batches."""
    parts, replicas = world_size * config.train.grad_accumulation, config.parallel.replicas
    if replicas < 1 or world_size % replicas:
        raise ValueError(f"parallel.replicas {replicas} does not divide {world_size} processes")
    if world_size < 1 or config.train.batch_size % parts:
        raise ValueError(
            f"train.batch_size {config.train.batch_size} is not a multiple of {world_size} "
            f"processes x train.grad_accumulation {config.train.grad_accumulation}"
        )
    micro = config.train.batch_size // parts
    adversary = config.adversarial
    if adversary.in_use == "vfm" and adversary.reference == "shuffled" and micro < 2:
        raise ValueError(
            "adversarial.reference shuffled needs micro-batches of two samples or more"
        )
