"""xi(t) measured: a Gaussian teacher whose error is known exactly, statistics, the file of rows."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from scipy import stats
from toy import GaussianNetwork, ToyAdapter

from senseflow.core.path import FlowPath, VPPath
from senseflow.data.items import Item
from senseflow.engine.build import Teacher
from senseflow.reconstruction_error.measure import (
    Measurement,
    Rows,
    curves,
    measure_samples,
    spread_times,
)
from senseflow.reconstruction_error.picture import COLOURS, _draw_errors

SCALES = torch.tensor([0.5, 2.0])  # standard deviations of the two coordinates
TIMES = (5.0, 200.0, 500.0, 800.0, 1000.0)
NUM = 4000


class GaussianSamples:
    """x_0 ~ N(0, diag(SCALES^2)), by item."""

    def __len__(self) -> int:
        return NUM

    def __getitem__(self, position) -> Item:
        generator = torch.Generator().manual_seed(1000 + position.item)
        x = SCALES * torch.randn(2, generator=generator)
        return Item("prompt", position.index, latents=x.view(2, 1, 1))


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return Teacher(
        adapter=ToyAdapter(FlowPath(), shape=(2, 1, 1)),
        unguided=None,
        anchors=None,
        teacher=GaussianNetwork(torch.zeros(2), torch.diag(SCALES)),
        dataset=GaussianSamples(),
        ranks=SimpleNamespace(device=torch.device("cpu")),
    )


@pytest.fixture(scope="module")
def wanted() -> Measurement:
    return Measurement(seed=3, times=TIMES, guidances=(1.0,))


@pytest.fixture(scope="module")
def rows(teacher, wanted) -> list:
    return measure_samples(teacher, wanted, range(NUM))


@pytest.mark.parametrize(("guidance", "whole"), [(0.0, False), (4.0, True)])
def test_where_guidance_is_off_the_prompt_alone_is_predicted(teacher, wanted, guidance, whole):
    """As Z-Image's, which counts from 0: half the work."""
    called = []

    class Told(ToyAdapter):
        def predict_guided(self, *arguments):
            called.append(arguments)
            return super().predict_guided(*arguments)

    told = replace(teacher, adapter=Told(FlowPath(), shape=(2, 1, 1)), unguided=0.0)
    measure_samples(told, replace(wanted, guidances=(guidance,)), range(1))
    assert bool(called) == whole


def test_a_gaussian_teachers_error_is_the_posteriors_variance(rows, wanted):
    """E (x_0 - E[x_0 | x_t])^2 = s^2 sigma^2 / (alpha^2 s^2 + sigma^2), by coordinate."""
    found = curves(rows, wanted, FlowPath())
    sigma = np.array([0, *TIMES]) / 1000
    s2 = SCALES.numpy()[:, None] ** 2
    exact = (s2 * sigma**2 / ((1 - sigma) ** 2 * s2 + sigma**2)).mean(0)
    (curve,) = found["curves"]
    assert found["times"] == [0, *TIMES]
    np.testing.assert_allclose(found["sigmas"], sigma, atol=1e-6)
    assert curve["error"][0] == curve["standard_error"][0] == 0
    deviation = (np.array(curve["error"]) - exact)[1:] / np.array(curve["standard_error"])[1:]
    assert np.abs(deviation).max() < 3.5
    assert max(np.array(curve["standard_error"])[1:] / exact[1:]) < 0.05  # the check is sharp
    np.testing.assert_allclose(found["power"], (SCALES**2).mean(), rtol=0.05)
    np.testing.assert_allclose(curve["normalised"], np.array(curve["error"]) / found["power"])


def test_standard_errors_are_those_of_scipy_and_of_the_jackknife(rows, wanted):
    (curve,) = curves(rows[:300], wanted, FlowPath())["curves"]
    errors = np.array([row["errors"][0] for row in rows[:300]])
    power = np.array([row["power"] for row in rows[:300]])
    np.testing.assert_allclose(curve["standard_error"][1:], stats.sem(errors))
    left_out = [
        np.delete(errors, i, 0).mean(0) / np.delete(power, i).mean() for i in range(len(power))
    ]
    jackknife = np.sqrt(299 / 300 * ((left_out - np.mean(left_out, 0)) ** 2).sum(0))
    np.testing.assert_allclose(curve["normalised_standard_error"][1:], jackknife, rtol=0.02)


def test_a_sample_is_measured_alike_in_every_batch(teacher, wanted, rows):
    alone = [measure_samples(teacher, wanted, range(s, s + 1))[0] for s in (0, 7, 8)]
    for row, s in zip(alone, (0, 7, 8), strict=True):
        assert row["sample"] == s
        np.testing.assert_allclose(row["errors"], rows[s]["errors"], rtol=1e-4)
        assert row["power"] == pytest.approx(rows[s]["power"])


def test_a_prediction_that_is_not_finite_is_refused(rows, wanted):
    broken = [*rows[:3], {**rows[3], "errors": [[float("nan")] * len(TIMES)]}]
    with pytest.raises(ValueError, match="not finite"):
        curves(broken, wanted, FlowPath())


def test_times_end_at_the_noisiest_and_are_whole():
    vp = VPPath(torch.linspace(0.999, 0.005, 1000))
    assert spread_times(FlowPath(), 4) == (250, 500, 750, 1000)
    assert spread_times(vp, 4) == (249, 499, 749, 999)
    for num in (7, 40, 999, 1000):
        for path in (FlowPath(), vp):
            times = spread_times(path, num)
            assert len(set(times)) == num and times[0] > path.clean
            assert times[-1] == path.noisiest


def test_rows_outlive_a_kill_that_cuts_a_line(tmp_path):
    file, header = tmp_path / "out" / "samples.jsonl", {"times": (1.0, 2.0), "seed": 0}
    made = [{"sample": i, "power": 1.0, "errors": [[0.1, 1 / 3]]} for i in range(3)]
    first = Rows(file, header)
    first.start()
    first.add(made, write=True)
    file.write_text(file.read_text()[:-10])
    again = Rows(file, header)
    assert again.rows == made[:2]
    again.start()
    again.add(made[2:], write=True)
    assert [json.loads(line) for line in file.read_text().splitlines()[1:]] == made
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:2], "{", *lines[3:]]) + "\n")
    assert Rows(file, header).rows == made[:1]  # a row after a gap does not count
    with pytest.raises(ValueError, match=r"samples.jsonl is of another measurement \(other seed\)"):
        Rows(file, {**header, "seed": 1})


def test_every_guidance_is_in_the_picture():
    """Also one more than there are colours."""
    curve = {"normalised": [0, 1, 2], "normalised_standard_error": [0, 0.1, 0.1]}
    guidances = range(1, len(COLOURS) + 2)
    axes = Figure().subplots()
    _draw_errors(
        axes, {"times": [0, 1, 2], "curves": [{**curve, "guidance": g} for g in guidances]}
    )
    assert [line.get_label() for line in axes.lines] == [f"guidance {g}" for g in guidances]
