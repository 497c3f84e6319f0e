"""The recipe of FLUX.2-klein from its shell script to an image, on a random pipeline; its cache."""

import json
import subprocess
from pathlib import Path

import pytest
from python import PYTHON
from training_runs import environment, rows

from senseflow.cache.__main__ import main as cache
from senseflow.config.load import load_recipe
from senseflow.config.recipes import RECIPES
from senseflow.engine.caches import prompt_facts
from senseflow.engine.inputs import read_run
from senseflow.teachers.chat import Chat
from senseflow.teachers.flux2.family import FLUX2
from senseflow.tiny.pictures import write_dataset

RECIPE = RECIPES["flux2_klein_senseflow"]
SHORT = [
    "train.iter_num=2",
    "train.batch_size=2",
    "train.resolution=32",
    "train.save_interval=2",
    "train.log_interval=1",
    "fake_score.ttur=1",
    "log.sample_interval=0",
    "lr_scheduler.warmup_iterations=0",
    "adversarial.kind=none",
    "precision.compute=float32",
    "data.max_sequence_length=38",
    "data.num_workers=0",
]


@pytest.fixture(scope="module")
def settings(flux2_folder, tmp_path_factory) -> list[str]:
    """Overrides of the published YAML."""
    folder = tmp_path_factory.mktemp("images")
    write_dataset(folder, num=4, seed=0, num_prompts=2)
    own = [f"paths.pretrained_model={flux2_folder}", f"paths.dataset={folder / 'data.json'}"]
    return [*SHORT, *own]


def run(*words: object) -> None:
    result = subprocess.run(
        list(map(str, words)), capture_output=True, text=True, env=environment(), timeout=1200
    )
    assert result.returncode == 0, result.stderr


def test_a_run_from_a_cache_is_the_run_and_its_student_is_drawn(settings, flux2_folder, tmp_path):
    """Prompts and latents of the cache: the posterior before its patches, and the null prompt."""
    assert cache([RECIPE.config, "--output", str(tmp_path / "cache"), *settings]) == 0
    index = json.loads((tmp_path / "cache" / "index.json").read_text())
    assert "enable_thinking" in json.dumps(index)
    for name, more in (("plain", []), ("cached", [f"paths.cache={tmp_path / 'cache'}"])):
        run("sh", RECIPE.script, 1, 1, RECIPE.config, tmp_path / name, *settings, *more)
    for mine, other in zip(rows(tmp_path / "plain"), rows(tmp_path / "cached"), strict=True):
        for key in ("loss/dmd", "loss/fake", "loss/isg"):
            assert mine[key] == pytest.approx(other[key], rel=1e-4), key
    words = [FLUX2.base_flag, flux2_folder, "--checkpoint", tmp_path / "plain"]
    run(PYTHON, RECIPE.draws, *words, "--prompt", "a red seven", "--output_dir", tmp_path / "out")
    (side,) = (tmp_path / "out").glob("0*.json")
    card = json.loads((tmp_path / "plain/student/step_0000002/senseflow.json").read_text())
    assert json.loads(side.read_text())["sigmas"] == pytest.approx(card["anchors"])


def test_a_cache_of_another_template_or_other_layers_is_refused(settings, tmp_path):
    config = load_recipe(RECIPE, Path(RECIPE.config), settings)
    assert cache([RECIPE.config, "--output", str(tmp_path / "cache"), "--prompts", *settings]) == 0
    cached = load_recipe(RECIPE, Path(RECIPE.config), [*settings, f"paths.cache={tmp_path}/cache"])
    read_run(cached, FLUX2)
    facts = prompt_facts(config, FLUX2, Path(config.paths.pretrained_model))
    assert facts["chat: hidden states"] == [9, 18, 27]
    object.__setattr__(FLUX2, "chat", Chat(True, (9, 18, 27)))
    with pytest.raises(ValueError, match="chat: enable_thinking: False in the cache, True here"):
        read_run(cached, FLUX2)


@pytest.fixture(autouse=True)
def as_it_was():
    chat = FLUX2.chat
    yield
    object.__setattr__(FLUX2, "chat", chat)
