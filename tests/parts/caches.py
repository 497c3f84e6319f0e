"""Caches of the embedded teachers, and iterations with and without them."""

import json
from pathlib import Path

from embedded import YAMLS

from senseflow.cache.__main__ import main
from senseflow.config.config import Config, load_config
from senseflow.config.recipes import RECIPES
from senseflow.distill.algorithm import train_iteration
from senseflow.distill.measures import Measures
from senseflow.engine.build import prepare
from senseflow.engine.inputs import read_run


def config_of(name: str, data: Path, *overrides: object) -> Config:
    return load_config(YAMLS[name], [f"paths.dataset={data}", *map(str, overrides)])


def make(name: str, data: Path, folder: Path, *words: object) -> int:
    """The command, in this process; its exit status."""
    line = [YAMLS[name], "--output", folder, *words, f"paths.dataset={data}"]
    return main([*map(str, line)])


def first(data: Path, num: int, file: Path) -> Path:
    """A data set of the first samples of another, beside it."""
    tree = {name: values[:num] for name, values in json.loads(data.read_text()).items()}
    file = data.with_name(file.name)
    file.write_text(json.dumps(tree))
    return file


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def losses(config: Config, folder: Path, num: int) -> list[dict[str, float]]:
    """Losses and gradient norms of the first iterations."""
    run = prepare(read_run(config, RECIPES[config.recipe].family), folder)
    data, rows = run.data(1), []
    for iteration in range(1, num + 1):
        measures = Measures()
        train_iteration(run.parts, next(data), iteration, measures)
        rows.append(measures.read(run.ranks))
    return rows
