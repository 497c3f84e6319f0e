"""A trainer module whose rank 1 is not like the others, in the way ODD of the environment says."""

import os
from pathlib import Path

from senseflow.config.recipes import Recipe
from senseflow.core.draws import Draws
from senseflow.launch import worker
from senseflow.launch.entry import main
from senseflow.trainer import trainer_flux_senseflow as trainer

run_alike, draw_alike = worker.run_worker, Draws.shared


def run_worker(recipe: Recipe, config: Path, folder: Path, overrides: list[str]) -> None:
    how = os.environ["ODD"] if os.environ["RANK"] == "1" else ""
    if how == "draws":
        Draws.shared = draw_oddly
    changed = ["ida.lam=0.5"] if how == "configuration" else []
    run_alike(recipe, config, folder, [*overrides, *changed])


def draw_oddly(self, purpose):
    """Another anchor from iteration 5 on."""
    odd = purpose == "anchor" and self.iteration >= 5
    return draw_alike(Draws(self.seed + odd, self.iteration, self.indices), purpose)


worker.run_worker = run_worker
main(trainer.RECIPE)
