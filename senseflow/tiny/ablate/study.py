"""What an ablation runs: tables of cells (overrides of a recipe), over teachers and seeds.

A study is a YAML file such as configs/ablation.yaml. Cells that come out as the same configuration,
in whatever table, are one trial, and a trial is known by its configuration: change the file, and
what has been run and has not changed is kept.
"""

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

from senseflow.common.fields import MOST, Bounds, Seed
from senseflow.config.config import Config, load_config
from senseflow.config.load import load_recipe
from senseflow.config.recipes import RECIPES
from senseflow.weights.fingerprint import base_fingerprint

Overrides = dict[str, Any]  # key.sub: value


@dataclass(frozen=True)
class TeacherChoice:
    """A teacher by the YAML of a recipe, and what every run of it changes there."""

    config: str
    overrides: Overrides = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """A row of a table: what it changes, and the row whose run it goes on from, if it does."""

    overrides: Overrides = field(default_factory=dict)
    teachers: dict[str, Overrides] = field(default_factory=dict)  # what else, by teacher
    after: str | None = None


@dataclass(frozen=True)
class Table:
    """Rows to be compared with each other."""

    title: str
    cells: dict[str, Cell]
    teachers: tuple[str, ...]
    overrides: Overrides = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """Everything one command runs."""

    seeds: tuple[Seed, ...]
    num_prompts: Annotated[int, Bounds(2, MOST)]  # of each measurement, half of them held out
    teachers: dict[str, TeacherChoice]
    tables: dict[str, Table]
    overrides: Overrides = field(default_factory=dict)
    quick: Overrides = field(default_factory=dict)  # what --quick changes besides

    def __post_init__(self) -> None:
        if not self.seeds:
            raise ValueError("seeds is empty: name at least one")
        for name, table in self.tables.items():
            if not table.cells or not table.teachers:
                raise ValueError(f"tables.{name}: cells and teachers must name at least one each")
            unknown = [t for t in table.teachers if t not in self.teachers]
            for row, cell in table.cells.items():
                unknown += [t for t in cell.teachers if t not in self.teachers]
                if cell.after is not None and cell.after not in table.cells:
                    raise ValueError(f"tables.{name}.cells.{row}.after: no row {cell.after!r}")
            if unknown:
                raise ValueError(f"tables.{name}: no teacher {unknown[0]!r} in teachers")


@dataclass(frozen=True)
class Trial:
    """One training run and its measurements."""

    teacher: str
    recipe: str
    config_file: str
    overrides: tuple[str, ...]  # key.sub=value, but for the data and what it goes on from
    num_prompts: int
    seed: int
    fingerprint: str  # of the teacher's weights
    key: str = ""  # of everything the result depends on
    after: "Trial | None" = None

    @property
    def name(self) -> str:
        """The trial's folder."""
        return f"{self.teacher_slug}_seed{self.seed}_{self.key}"

    @property
    def teacher_slug(self) -> str:
        """The teacher's name in files: lower-case letters and digits, joined by underscores."""
        return re.sub(r"\W+", "_", self.teacher.lower()).strip("_")

    @property
    def ruler(self) -> str:
        """The name of what its teacher measures by itself, and of its reference pictures."""
        return f"{self.teacher_slug}_{self.fingerprint[:8]}_{self.num_prompts}"

    def folder(self, output: Path) -> Path:
        """Where it works and leaves its results."""
        return output / "trials" / self.name

    def config(self, dataset: Path, initial: Path | None = None) -> Config:
        """The configuration of its run: on this data, from this run if it goes on from one, and
        else from the teacher, whatever its recipe begins with."""
        paths = [f"paths.dataset={dataset}", f"paths.initial={initial or 'null'}"]
        return load_recipe(RECIPES[self.recipe], Path(self.config_file), [*self.overrides, *paths])


Place = tuple[str, str, str, int]  # table, teacher, row, seed


def quick(study: Study) -> Study:
    """A study with a teacher per table, two seeds and a few pictures, to see that it runs."""
    tables = {
        name: dataclasses.replace(table, teachers=table.teachers[:1])
        for name, table in study.tables.items()
    }
    num_prompts = min(8, study.num_prompts)
    return dataclasses.replace(study, seeds=study.seeds[:2], num_prompts=num_prompts, tables=tables)


def places_of(study: Study, is_quick: bool = False) -> dict[Place, Trial]:
    """The trial of every cell, teacher and seed; equal ones are the same trial.

    Raises ValueError for an override that is not a key of the recipe or has a wrong value.
    """
    places: dict[Place, Trial] = {}
    recipes = {name: load_config(choice.config).recipe for name, choice in study.teachers.items()}
    for seed in study.seeds:  # outermost, so that a study cut short has whole seeds
        for name, table in study.tables.items():
            for teacher in table.teachers:
                for row in in_order(table):
                    last = study.quick if is_quick else {}
                    cell = table.cells[row]
                    after = places[name, teacher, cell.after, seed] if cell.after else None
                    try:
                        changes = changes_of(study, table, teacher, cell) | last
                        trial = trial_of(study, teacher, recipes[teacher], changes, seed, after)
                    except ValueError as error:
                        raise ValueError(f"tables.{name}.cells.{row}: {error}") from None
                    places[name, teacher, row, seed] = trial
    return places


def in_order(table: Table) -> list[str]:
    """Its rows, each after the one it goes on from; raises ValueError for a circle."""
    done: list[str] = []
    while len(done) < len(table.cells):
        ready = [
            row
            for row, cell in table.cells.items()
            if row not in done and (cell.after is None or cell.after in done)
        ]
        if not ready:
            raise ValueError("its rows go on from each other in a circle")
        done += ready
    return done


def changes_of(study: Study, table: Table, teacher: str, cell: Cell) -> Overrides:
    """The overrides of a cell; the later of study, teacher, table and cell wins."""
    own = cell.teachers.get(teacher, {})
    choice = study.teachers[teacher]
    return study.overrides | choice.overrides | table.overrides | cell.overrides | own


def trial_of(
    study: Study, teacher: str, recipe: str, changes: Overrides, seed: int, after: Trial | None
) -> Trial:
    """The trial of one cell with one seed."""
    own = {"train.seed", "paths.dataset", "paths.initial"} & changes.keys()
    if own:
        raise ValueError(f"{own.pop()} is the ablation's own: seeds, its pictures, a row's `after`")
    changes = changes | {"train.seed": seed}
    overrides = tuple(f"{key}={json.dumps(value)}" for key, value in sorted(changes.items()))
    file = study.teachers[teacher].config
    trial = Trial(teacher, recipe, file, overrides, study.num_prompts, seed, "", after=after)
    config = trial.config(Path("data.json"))
    fingerprint = weights_of(config.paths.pretrained_model, RECIPES[recipe].family.component)
    depends = [not_default(config), study.num_prompts, fingerprint, after.key if after else None]
    key = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:10]
    return dataclasses.replace(trial, fingerprint=fingerprint, key=key)


@lru_cache
def weights_of(pipeline: str, component: str) -> str:
    """The fingerprint of a teacher's weights."""
    return base_fingerprint(Path(pipeline) / component)


def not_default(settings: Any) -> dict[str, Any]:
    """The values of a tree of dataclasses that are not their fields' defaults.

    A key that a later version adds, at its default, therefore changes nothing.
    """
    found = {}
    for each in dataclasses.fields(settings):
        value = getattr(settings, each.name)
        if dataclasses.is_dataclass(value):
            found[each.name] = not_default(value)
        elif value != each.default:
            found[each.name] = value
    return found
