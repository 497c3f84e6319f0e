"""Measures, the log file and the image strip."""

import json

import numpy as np
import pytest
import torch

from senseflow.common.pictures import labelled_grid, save_whole
from senseflow.common.ranks import Ranks
from senseflow.distill.measures import STOPWATCH, Measures, image_drift, phase
from senseflow.engine.log import Log

ONE = Ranks(0, 1, torch.device("cpu"), None)


def test_measures_are_means_and_start_afresh():
    measures = Measures()
    measures.add({"loss/a": torch.tensor(1.0), "loss/b": torch.tensor(5.0)})
    measures.add({"loss/a": torch.tensor(3.0)})
    assert measures.read(ONE) == {"loss/a": 2.0, "loss/b": 5.0}
    assert measures.read(ONE) == {}


def test_drift_of_known_pictures():
    grey = torch.zeros(1, 3, 4, 4)  # 0.5 everywhere
    red = torch.tensor([1.0, -1, -1]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    drift = image_drift(red, grey)
    assert drift["drift/mean"].item() == pytest.approx(1 / 3 - 1 / 2)
    assert drift["drift/saturation"].item() == pytest.approx(1.0)
    assert drift["drift/contrast"].item() > 0.4


def test_contrast_is_numpys_deviation_of_each_image():
    images = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.2
    images *= torch.tensor([0.5, 1.0, 2.0]).view(-1, 1, 1, 1)
    expected = np.mean([(image.numpy() / 2).std() for image in images.clamp(-1, 1)])
    drift = image_drift(images, torch.zeros_like(images))  # one colour has none
    assert drift["drift/contrast"].item() == pytest.approx(float(expected), rel=1e-5)


def test_stopwatch_counts_a_phase_over_its_calls():
    @phase("a phase")
    def work():
        return sum(range(1000))

    STOPWATCH.read()
    work(), work()
    seconds = STOPWATCH.read()
    assert set(seconds) == {"a phase"} and seconds["a phase"] > 0
    assert STOPWATCH.read() == {}


def test_log_rewinds_to_the_checkpoint_it_goes_on_from(tmp_path):
    log = Log(tmp_path, tensorboard=False)
    for iteration in (10, 20, 30):
        log.write(iteration, {"loss/dmd": float(iteration)})
    with (tmp_path / "stats.jsonl").open("a") as stream:
        stream.write('{"iteration": 40, "lo')  # cut short by a crash
    Log(tmp_path, tensorboard=False, done=20)
    rows = [json.loads(row) for row in (tmp_path / "stats.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [10, 20]


def test_strip_has_a_labelled_column_per_picture(tmp_path):
    columns = {"black": -torch.ones(2, 3, 32, 32), "white": torch.ones(2, 3, 32, 32)}
    picture = labelled_grid(columns)
    assert picture.size == (2 * 96, 16 + 2 * 96)
    assert picture.getpixel((48, 60)) == (0, 0, 0) and picture.getpixel((144, 60)) == (255,) * 3
    save_whole(picture, tmp_path / "a" / "strip.png")
    assert [f.name for f in (tmp_path / "a").iterdir()] == ["strip.png"]
