"""A run folder, a student and a cache of the build before the move go on (fixtures/README.md).

Sums differ in their last bits from processor to processor, also between two of one model name.
"""

import json
import logging
import shutil
import tarfile
from pathlib import Path

import command_line
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from short_runs import begin, finish
from training_runs import rows

from senseflow.config.config import load_config
from senseflow.config.load import load_recipe
from senseflow.config.recipes import RECIPES
from senseflow.report.__main__ import main as report
from senseflow.teachers.flux.family import FLUX

STORED = Path(__file__).parent / "fixtures/before_the_move.tar.xz"


@pytest.fixture(scope="module")
def old(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(STORED) as archive:
        archive.extractall(folder, filter="data")
    return folder / "before_the_move"


@pytest.fixture(scope="module")
def resumed(old, tmp_path_factory) -> tuple[Path, list[str]]:
    """A copy of the run, carried on to iteration 4; what was said.

    With its own config.yaml, but for a key that it does not know and newer files say.
    """
    run = tmp_path_factory.mktemp("resumed") / "run"
    shutil.copytree(old / "run", run)
    here = [
        f"paths.pretrained_model={old / 'teacher'}",
        f"paths.dataset={old / 'data/data.json'}",
        f"paths.cache={old / 'cache'}",
        f"paths.dinov2=local-dir:{old / 'dinov2'}",
        "train.iter_num=4",
        "adversarial.text_layer=equalized",
    ]
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("senseflow")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        config = load_recipe(RECIPES["flux_senseflow"], old / "run/config.yaml", here)
        finish(begin(config, run))
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    return run, said


def test_the_run_goes_on_as_its_own_build_carried_it_on(old, resumed):
    run, said = resumed
    assert any("going on from" in line and "step_0000002" in line for line in said)
    then = [json.loads(row) for row in (old / "carried_on/stats.jsonl").read_text().splitlines()]
    now = rows(run)[2:]
    assert [row["iteration"] for row in now] == [3, 4]
    for old_row, row in zip(then, now, strict=True):
        measured = {name for name in old_row if "time_s" not in name}
        assert measured <= row.keys()
        for name in measured:
            assert row[name] == pytest.approx(old_row[name], 1e-3, 1e-6), name


@pytest.mark.parametrize("kind", ["student", "ema"])
def test_its_weights_are_those_of_its_own_build(old, resumed, kind):
    then = load_file(old / f"carried_on/{kind}.safetensors")
    file = resumed[0] / kind / "step_0000004/diffusion_pytorch_model.safetensors"
    now = load_file(file)
    assert then.keys() == now.keys()
    for key, value in then.items():
        assert torch.allclose(now[key], value, rtol=0, atol=1e-5), key


def test_its_heads_keep_their_plain_text_layer(old, resumed):
    run, said = resumed
    assert load_config(old / "run/config.yaml").adversarial.text_layer == "linear"
    assert load_config(run / "config.yaml").adversarial.text_layer == "linear"
    (line,) = [line for line in said if "text_layer" in line]
    assert line.startswith("adversarial.text_layer: linear, not equalized: the heads of")
    assert "changed configuration" not in line


def test_the_run_reads_its_cache(resumed):
    assert any("paths.cache" in line and "prompts, clip, latents" in line for line in resumed[1])


@pytest.mark.parametrize(("flags", "name"), [((), "student"), (("--ema",), "ema")])
def test_its_student_draws_the_same_image(old, tmp_path, flags, name):
    words = ("--checkpoint", old / "run", "--prompt", "red", "--output_dir", tmp_path, *flags)
    assert command_line.call(FLUX, old / "teacher", *words) == 0
    image = command_line.only_picture(tmp_path)
    stored = np.array(Image.open(old / f"drawn/{name}.png"))
    assert command_line.grey_levels_apart(image, stored) <= 1


def test_its_report_is_written(old, tmp_path):
    assert report([str(old / "run"), "--output", str(tmp_path / "page.html")]) == 0
    assert "loss/dmd" in (tmp_path / "page.html").read_text(encoding="utf-8")
