"""How a training script reads its YAML: its own recipe's, checked against the processes."""

import logging
from dataclasses import replace
from pathlib import Path

from senseflow.common.files import ROOT
from senseflow.config.config import Config, build_config
from senseflow.config.recipes import RECIPES, Recipe
from senseflow.config.strict_yaml import read_tree

logger = logging.getLogger(__name__)


def load_recipe(recipe: Recipe, file: Path, overrides: list[str]) -> Config:
    """The configuration in `file` with `key.sub=value` overrides.

    A YAML of the recipe `lends_paths` gives its paths alone (and not its own size of teacher);
    all numbers are those of this recipe's own YAML beside it. Raises ValueError for a YAML of
    any other recipe, and for another adversary than this recipe's.
    """
    # First of all: what else is wrong with another recipe's file is of no interest.
    config = _load_own(file, overrides, (recipe.name, recipe.lends_paths))
    if config.recipe == recipe.lends_paths:
        read = _beside(recipe, file)
        own, paths = _load_own(read, overrides, (recipe.name,)), config.paths
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
    if config.adversarial.in_use not in (recipe.adversary, "none"):
        raise ValueError(
            f"{file}: adversarial.kind {config.adversarial.kind}: {recipe.name} has "
            f"{recipe.adversary} or none"
        )
    return config


def _load_own(file: Path, overrides: list[str], names: tuple[str | None, ...]) -> Config:
    """The configuration in a file of one of these recipes; raises ValueError for another's."""
    tree = read_tree(file, overrides)
    if (found := tree.get("recipe")) in [name for name in RECIPES if name not in names]:
        raise ValueError(
            f"{file} is the recipe {found}, which sh {RECIPES[found].script} runs; this script "
            f"runs {names[0]}"
        )
    return build_config(tree, file)


def _beside(recipe: Recipe, file: Path) -> Path:
    """The recipe's own YAML next to that of `lends_paths`, else the published one."""
    assert recipe.lends_paths
    own = file.with_name(file.name.replace(recipe.lends_paths, recipe.name))
    return own if own != file and own.is_file() else ROOT / recipe.config


def require_no_images(config: Config, data: str | None = None) -> None:
    """Raise ValueError, naming every key, for a run on prompts alone that would look at images.

    data: what says that there are prompts alone; None: paths.dataset.
    """
    adversary, p = config.adversarial.in_use, config.backward_simulation.probability
    needed = {}
    if adversary != "none":
        needed[f"adversarial.kind {adversary}"] = "adversarial.kind=none"
    if p < 1:
        needed[f"backward_simulation.probability {p:g}"] = "backward_simulation.probability=1"
    if needed:
        raise ValueError(
            f"{data or f'paths.dataset {config.paths.dataset}'} has prompts and no images, which "
            f"{' and '.join(needed)} would look at: say {' '.join(needed.values())}"
        )


def check_split(config: Config, world_size: int) -> None:
    """The global batch must divide over processes and micro-batches; says what is never done."""
    parts, replicas = world_size * config.train.grad_accumulation, config.parallel.replicas
    if replicas < 1 or world_size % replicas:
        raise ValueError(f"parallel.replicas {replicas} does not divide {world_size} processes")
    if world_size < 1 or config.train.batch_size % parts:
        raise ValueError(
            f"train.batch_size {config.train.batch_size} is not a multiple of {world_size} "
            f"processes x train.grad_accumulation {config.train.grad_accumulation}"
        )
    if config.fake_score.ttur > config.train.iter_num:
        logger.warning(
            "fake_score.ttur %d is above train.iter_num %d: the student is never updated",
            config.fake_score.ttur,
            config.train.iter_num,
        )
    micro = config.train.batch_size // parts
    adversary = config.adversarial
    if adversary.in_use == "vfm" and adversary.reference == "shuffled" and micro < 2:
        raise ValueError(
            "adversarial.reference shuffled needs micro-batches of two samples or more"
        )
