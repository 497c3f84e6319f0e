"""One plan: a configuration on so many GPUs, a teacher's folder made up, iterations traced."""

import gc
import math
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from senseflow.common.tables import has_prompts_alone
from senseflow.config.config import Config, load_config
from senseflow.config.load import check_split, load_recipe, require_no_images
from senseflow.config.recipes import RECIPES, Recipe
from senseflow.plan.blank import PlanData
from senseflow.plan.costs import Costs, Gpu, Phases, kinds_of, likely_worst_first, peak
from senseflow.plan.rehearsal import Kind, NetworkBytes, rehearse, silent_anchors
from senseflow.plan.scorer_files import stand_in_files
from senseflow.plan.stand_in import copy_teacher, write_teacher, write_vision


@dataclass(frozen=True)
class Wanted:
    """What is to be planned."""

    file: Path  # the YAML
    overrides: tuple[str, ...]
    nodes: int
    gpus: int  # per node
    data: PlanData | None = None  # None: as the recipe's YAML says

    @property
    def world_size(self) -> int:
        """GPUs over all nodes."""
        return self.nodes * self.gpus


@dataclass(frozen=True)
class Plan:
    """What one rank of the run holds, sends and computes."""

    wanted: Wanted
    config: Config
    teacher: str  # where its configuration is from
    data: PlanData
    networks: dict[str, NetworkBytes]
    costs: Costs
    kinds: Sequence[Kind]  # that were to be traced

    @property
    def peak(self) -> int:
        """Bytes on each GPU at the worst moment of the worst iteration."""
        return peak(self.costs.traced[self.costs.worst()])

    def reserve(self, gpu: Gpu) -> float:
        """GiB of each GPU that no tensor gets."""
        return gpu.kept(self.wanted.world_size, self.config.parallel.replicas)

    def spare(self, gpu: Gpu) -> float:
        """Bytes of each GPU that are left at the worst moment; below 0 it does not fit."""
        return gpu.room(self.wanted.world_size, self.config.parallel.replicas) - self.peak

    def fits(self, gpu: Gpu) -> bool:
        """Whether the worst moment of the worst iteration has room."""
        return self.spare(gpu) >= 0


def make_plan(
    wanted: Wanted, kinds: Sequence[Kind] | None = None, within: Gpu | None = None
) -> Plan:
    """Build the run and trace its iterations; `kinds`: these alone; `within`: until one does not
    fit.

    Raises ValueError as a run would for its configuration.
    """
    eager = (*wanted.overrides, "parallel.compile=false")  # the same work; fakes are not compiled
    wanted = replace(wanted, overrides=eager)
    asked = load_config(wanted.file, list(wanted.overrides))
    recipe = RECIPES[asked.recipe]
    data = wanted.data or data_of(asked, recipe)
    if wanted.data == "prompts":
        require_no_images(asked, "--data prompts")
    with tempfile.TemporaryDirectory(prefix="senseflow_plan_") as folder:
        config, teacher = configure(recipe, wanted, Path(folder))
        room = within.room(wanted.world_size, config.parallel.replicas) if within else math.inf
        title = f"{config.recipe} on {wanted.world_size}"
        with tqdm(desc=title, unit="step", postfix="building") as bar:
            with rehearse(config, recipe.family, wanted.world_size, data) as rehearsal:
                silent = silent_anchors(rehearsal.parts)
                kinds = kinds or all_kinds(config, silent, within)
                bar.reset(len(kinds) + 2)
                bar.update()
                bar.set_postfix_str("first steps")
                networks = rehearsal.hold()
                traced: dict[Kind, Phases] = {}
                for kind in kinds:
                    bar.update()
                    bar.set_postfix_str(str(kind))
                    traced[kind] = rehearsal.iterate(kind)
                    if peak(traced[kind]) > room:
                        break
            bar.update()
        del rehearsal
        gc.collect()
    return Plan(wanted, config, teacher, data, networks, Costs(config, traced, silent), kinds)


def all_kinds(config: Config, silent: Collection[int], within: Gpu | None) -> list[Kind]:
    """Those that tell all; where one that does not fit is enough, the likely worst first."""
    kinds = kinds_of(config, silent)
    return likely_worst_first(kinds) if within else kinds


def data_of(config: Config, recipe: Recipe) -> PlanData:
    """What a run of this configuration reads; raises ValueError where its cache does not tell."""
    if has_prompts_alone(Path(config.paths.dataset)):
        require_no_images(config)
        return "prompts" if config.paths.cache is None else "cached"
    if config.paths.cache is None:
        return recipe.family.data
    if recipe.family.data == "images" and config.data.crop == "center":
        return "cached"
    raise ValueError(
        "paths.cache: a plan reads none, and cannot tell what is in one of latents, or of images "
        f"with data.crop={config.data.crop}; say --data"
    )


def configure(recipe: Recipe, wanted: Wanted, folder: Path) -> tuple[Config, str]:
    """The configuration with everything it reads made up in `folder`; whose teacher it is."""
    config = load_recipe(recipe, wanted.file, list(wanted.overrides))
    check_split(config, wanted.world_size)
    if config.paths.initial:
        raise ValueError("paths.initial: a plan needs none, the networks are the same; say null")
    source, family = Path(config.paths.pretrained_model), recipe.family
    if source.exists():
        copy_teacher(source, folder / source.name, family)
        teacher, copy = str(source), folder / source.name
    else:
        copy = folder / "teacher"
        write_teacher(copy, family)
        teacher = f"as published ({family.published.terms.base_model}), for {source} is not here"
    made_up = [f"paths.pretrained_model={copy}", "paths.cache=null"]
    if config.adversarial.in_use == "vfm":
        made_up += write_vision(folder / "vision", config.paths)
    config = load_recipe(recipe, wanted.file, [*wanted.overrides, *made_up])
    if config.reward.in_use:
        files = stand_in_files(config.reward.files, folder / "rewards")
        config = replace(config, reward=replace(config.reward, files=files))
    return config, teacher
