"""How a training script reads its YAML: its own recipe's, checked against the processes."""

import logging
import re
from dataclasses import replace
from pathlib import Path

from senseflow.common.files import ROOT
from senseflow.config.config import Config, load_config
from senseflow.config.recipes import RECIPES, Recipe

logger = logging.getLogger(__name__)

_RECIPE = re.compile(r"^recipe:[ \t]*[\"']?(\w+)", re.MULTILINE)


def load_recipe(recipe: Recipe, file: Path, overrides: list[str]) -> Config:
    """The configuration in `file` with `key.sub=value` overrides.

    A YAML of the recipe `lends_paths` gives its paths alone (and not its own size of teacher);
    all numbers are those of this recipe's own YAML beside it. Raises ValueError for a YAML of
    any other recipe, and for another adversary than this recipe's.
    """
    if not any(override.startswith("recipe=") for override in overrides):
        # First, by this line alone: what else is wrong may be so for this script only.
        said = _RECIPE.search(file.read_text(errors="replace")) if file.is_file() else None
        if said and said[1] in RECIPES and said[1] not in (recipe.name, recipe.lends_paths):
            raise _of_another(recipe, file, said[1])
    config, read = load_config(file, overrides), file
    if recipe.lends_paths and config.recipe == recipe.lends_paths:
        read = _beside(recipe, file)
        own, paths = load_config(read, overrides), config.paths
        if not recipe.family.is_this_size(Path(paths.pretrained_model)):
            logger.info("paths.pretrained_model is %s's: taking this recipe's", config.recipe)
            paths = replace(paths, pretrained_model=own.paths.pretrained_model)
        config = replace(own, paths=paths)
        logger.info(
            "%s is the recipe %s: its paths are used, and the numbers of %s",
            file,
            recipe.lends_paths,
            read,
        )
    if config.recipe != recipe.name:
        raise _of_another(recipe, read, config.recipe)
    if config.adversarial.in_use not in (recipe.adversary, "none"):
        raise ValueError(
            f"{file}: adversarial.kind {config.adversarial.kind}: {recipe.name} has "
            f"{recipe.adversary} or none"
        )
    return config


def _of_another(recipe: Recipe, file: Path, name: str) -> ValueError:
    return ValueError(
        f"{file} is the recipe {name}, which sh {RECIPES[name].script} runs; this script runs "
        f"{recipe.name}"
    )


def _beside(recipe: Recipe, file: Path) -> Path:
    """The recipe's own YAML next to that of `lends_paths`, else the published one."""
    assert recipe.lends_paths
    own = file.with_name(file.name.replace(recipe.lends_paths, recipe.name))
    return own if own != file and own.is_file() else ROOT / recipe.config


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
