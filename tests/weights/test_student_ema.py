"""Which weights `--ema` stands for, in every form of a checkpoint that may hold an average."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from senseflow.sampling.drawing import Paths
from senseflow.weights.card import CARD, StudentCard, read_card, write_card
from senseflow.weights.student import find_student, open_weights

WEIGHTS = "diffusion_pytorch_model.safetensors"
PLAIN = StudentCard("flux", (1.0, 0.5), 32, 32, None, 12, "base", "0" * 64, 20)


def component(folder: Path, ema: float | None) -> Path:
    folder.mkdir(parents=True)
    save_file({"w": torch.ones(1)}, folder / WEIGHTS)
    write_card(folder, dataclasses.replace(PLAIN, ema=ema))
    return folder


@pytest.fixture
def run(tmp_path) -> Path:
    """A run with students at 10 and 20 and the average of the first alone."""
    folder = tmp_path / "run"
    for step in ("step_0000010", "step_0000020"):
        component(folder / "student" / step, None)
        (folder / "checkpoints" / step).mkdir(parents=True)
    component(folder / "ema" / "step_0000010", 0.9)
    return folder


STEP = "ema/step_0000010"


@pytest.mark.parametrize("part", ["", "ema", STEP, f"{STEP}/{WEIGHTS}", "checkpoints/step_0000010"])
def test_the_average_of_a_run_and_its_parts(run, part):
    found = find_student(run / part, ema=True)
    assert found.weights == run / "ema" / "step_0000010" / WEIGHTS
    assert found.card is not None and found.card.ema == 0.9


@pytest.mark.parametrize(
    "part, said",
    [
        ("checkpoints/step_0000020", r"step_0000020 holds no EMA: there is no .*ema/step_0000020"),
        ("checkpoints", r"step_0000020 holds no EMA"),
        ("student", r"is no EMA; --ema takes a run trained with ema.decay"),
        ("student/step_0000010", r"is no EMA; --ema takes a run trained with ema.decay"),
        (f"student/step_0000010/{WEIGHTS}", r"is no EMA; --ema takes"),
    ],
)
def test_where_there_is_none_it_is_said(run, part, said):
    with pytest.raises(ValueError, match=said):
        find_student(run / part, ema=True)


def test_a_run_without_averages(run):
    (run / "ema").rename(run.parent / "elsewhere")
    with pytest.raises(
        ValueError, match=r"run holds no EMA: the run was trained without ema.decay"
    ):
        find_student(run, ema=True)


def test_of_a_pickle_the_average_alone(tmp_path):
    file = tmp_path / "a.pth"
    torch.save({"model": {"w": torch.zeros(1)}, "ema_model": {"w": torch.ones(1)}}, file)
    found = find_student(file, ema=True)
    assert open_weights(found.weights, found.ema).read("w") == 1
    assert open_weights(file).read("w") == 0
    for content in ({"model": {"w": torch.zeros(1)}}, {"w": torch.zeros(1)}):
        torch.save(content, file)
        with pytest.raises(ValueError, match=r"a.pth holds no EMA: there is no 'ema_model' in it"):
            open_weights(file, ema=True)


def test_cards_from_before_there_were_averages_are_read(tmp_path):
    write_card(tmp_path, PLAIN)
    tree = json.loads((tmp_path / CARD).read_text())
    del tree["ema"]
    (tmp_path / CARD).write_text(json.dumps(tree))
    assert read_card(tmp_path) == PLAIN


def test_the_teacher_has_no_average(tmp_path):
    with pytest.raises(ValueError, match="ema is of a student: name its checkpoint"):
        Paths(tmp_path, ema=True)
