"""Short runs on the embedded teachers within the process of the test."""

from pathlib import Path

from embedded import YAMLS

from senseflow.common.signals import StopRequest
from senseflow.config.config import Config
from senseflow.config.load import load_recipe
from senseflow.config.recipes import RECIPES
from senseflow.engine.build import prepare
from senseflow.engine.inputs import read_run
from senseflow.engine.loop import Run
from senseflow.tiny.pictures import write_dataset

SHORT = (
    "adversarial.taps=[5]",  # two heads in place of seven: half of what a run costs
    "train.batch_size=2",
    "train.save_interval=2",
    "log.sample_interval=0",
    "log.tensorboard=false",
    "lr_scheduler.warmup_iterations=0",
    "lr_scheduler.decay_iterations=0",
)


def write_pictures(folder: Path) -> Path:
    """The JSON file of eight pictures."""
    write_dataset(folder, num=8, seed=0, num_prompts=4)
    return folder / "data.json"


def configure(data: Path, *overrides: str, recipe: str = "flux_senseflow") -> Config:
    settings = [f"paths.dataset={data}", *SHORT, *overrides]
    return load_recipe(RECIPES[recipe], Path(YAMLS[recipe]), settings)


def begin(config: Config, folder: Path) -> Run:
    return prepare(read_run(config, RECIPES[config.recipe].family), folder)


def finish(run: Run) -> Run:
    """From its newest checkpoint, if there is one, to its end."""
    with run.checkpoints:
        run.train(run.resume(), StopRequest(), show=False)
    return run
