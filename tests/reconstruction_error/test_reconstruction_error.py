"""python -m senseflow.reconstruction_error as a user types it."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from embedded import YAMLS
from PIL import Image
from ranks import on_ranks
from statuses import status_of

from senseflow.config.config import load_config
from senseflow.config.recipes import RECIPES
from senseflow.core.draws import Draws
from senseflow.core.path import add_noise
from senseflow.data.convert.__main__ import main as convert
from senseflow.engine.build import prepare_teacher
from senseflow.engine.inputs import read_inputs
from senseflow.reconstruction_error.__main__ import main
from senseflow.tiny.pictures import write_dataset

NUM = 4


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_dataset(folder, num=6, seed=0, num_prompts=2)
    return folder / "data.json"


@pytest.fixture(scope="module")
def latents(images, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lmdb") / "latents"
    words = [str(images), "--output", str(folder), "--teacher", "assets/tiny/sdxl/pipeline"]
    assert convert([*words, "--resolution", "32"]) == 0
    return folder


def measured(name: str, data: Path, folder: Path, *words: object, num: int = NUM) -> dict:
    line = [YAMLS[name], "--output", folder, "--num_samples", num, "--num_times", 8, *words]
    assert main([*map(str, line), f"paths.dataset={data}"]) == 0
    return json.loads((folder / "xi.json").read_text())


@pytest.fixture(scope="module")
def flux(images, tmp_path_factory) -> Path:
    """The folder of a finished measurement of the embedded FLUX teacher."""
    folder = tmp_path_factory.mktemp("flux") / "xi"
    measured("flux_senseflow", images, folder, "--batch_size", 2)
    return folder


def direct_errors(name: str, data: Path, times: list[float], scale: float) -> torch.Tensor:
    """xi (T,) over the first samples from the guided prediction, all of them in one batch."""
    config = load_config(YAMLS[name], [f"paths.dataset={data}"])
    teacher = prepare_teacher(read_inputs(config, RECIPES[name].family))
    adapter, path = teacher.adapter, teacher.adapter.path
    order = torch.randperm(6, generator=Draws(0, 0, ()).shared("epoch"))[:NUM].tolist()
    pictures = json.loads(data.read_text())
    files = [data.parent / pictures["image_paths"][i] for i in order]
    levels = [torch.frombuffer(Image.open(f).convert("RGB").tobytes(), dtype=torch.uint8)
              for f in files]  # fmt: skip
    x = torch.stack(levels).view(NUM, 32, 32, 3).movedim(3, 1) / 127.5 - 1
    draws = Draws(0, 0, tuple(range(NUM)))
    x_0 = adapter.draw_latents(
        adapter.encode_images(x), draws.normal("posterior", adapter.latent_shape())
    )
    eps = draws.normal("eps", adapter.latent_shape())
    cond = adapter.encode_prompts([pictures["prompts"][i] for i in order])
    errors = []
    for reading in times:
        t = torch.full((NUM,), reading)
        x_t = add_noise(path, x_0, eps, t)
        with torch.no_grad():
            output = adapter.predict_guided(
                teacher.teacher, x_t, t, cond, torch.full((NUM,), scale)
            )
        alpha, sigma = path.alpha_sigma(torch.tensor(reading))
        guess = x_t - sigma * output if "sdxl" not in name else (x_t - sigma * output) / alpha
        errors.append(((guess - x_0) ** 2).mean())
    return torch.stack(errors)


@pytest.mark.parametrize("name", ["flux_senseflow", "sd35_senseflow", "sdxl_senseflow"])
def test_every_family_is_measured(name, images, tmp_path):
    tree = measured(name, images, tmp_path / "xi", "--guidance", 1, "--guidance", 3)
    times = tree["times"]
    last = 999 if "sdxl" in name else 1000
    assert len(times) == 9 and times[-1] == last and tree["num_samples"] == NUM
    for curve, scale in zip(tree["curves"], (1.0, 3.0), strict=True):
        assert curve["guidance"] == scale and curve["error"][0] == 0
        direct = direct_errors(name, images, times[1:], scale)
        torch.testing.assert_close(torch.tensor(curve["error"][1:]), direct, rtol=1e-3, atol=1e-5)
    rows = list(csv.DictReader((tmp_path / "xi" / "xi.csv").open()))
    assert len(rows) == 18 and float(rows[-1]["error"]) == tree["curves"][1]["error"][-1]
    assert Image.open(tmp_path / "xi" / "xi.png").size[0] > 600


def test_latents_are_data_as_well(latents, tmp_path):
    tree = measured("sdxl_senseflow", latents, tmp_path / "xi")
    assert tree["curves"][0]["error"][-1] > tree["curves"][0]["error"][1] > 0


def test_a_measurement_goes_on_to_the_same_numbers(flux, images, tmp_path, capsys):
    measured("flux_senseflow", images, tmp_path / "xi", "--batch_size", 2, num=2)
    assert measured("flux_senseflow", images, tmp_path / "xi", "--batch_size", 2) == json.loads(
        (flux / "xi.json").read_text()
    )
    rows = (tmp_path / "xi" / "samples.jsonl").read_text()
    assert rows == (flux / "samples.jsonl").read_text()
    line = [YAMLS["flux_senseflow"], "--output", str(tmp_path / "xi"), "--num_samples", "4"]
    assert main([*line, f"paths.dataset={images}"]) == 2
    assert "of another measurement (other times)" in capsys.readouterr().err


def _measure_on_a_rank(rank: int, images: Path, folder: Path) -> None:
    line = [YAMLS["flux_senseflow"], "--output", str(folder), "--num_samples", str(NUM - 1)]
    line += ["--num_times", "8", "--batch_size", "1", f"paths.dataset={images}"]
    assert main(line) == 0


@pytest.mark.long
def test_two_ranks_measure_what_one_does(flux, images, tmp_path):
    """Three samples, so that one rank has none at the end."""
    on_ranks(2, _measure_on_a_rank, images, tmp_path / "two")
    lines = [(f / "samples.jsonl").read_text().splitlines() for f in (tmp_path / "two", flux)]
    two, one = ([json.loads(line) for line in part[1:]] for part in lines)
    assert [row["sample"] for row in two] == [0, 1, 2]
    for mine, theirs in zip(two, one, strict=False):
        torch.testing.assert_close(
            torch.tensor(mine["errors"]), torch.tensor(theirs["errors"]), rtol=1e-3, atol=1e-6
        )


# ------------------------------------------------------------------------------ wrong input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.yaml"], "config file not found: nowhere.yaml"),
        (["CONFIG", "--num_samples", "1"], "--num_samples: 1 must be from 2 to"),
        (["CONFIG", "--num_times", "1001"], "--num_times: 1001 must be from 2 to 1000"),
        (["CONFIG", "--guidance", "nan"], "--guidance: nan must be from 0 to 100"),
        (["CONFIG", "--guidance", "2", "--guidance", "2"], "the same number twice"),
        (["SD35", "paths.dataset=DATA", "--guidance", "0"], "SD3.5 Medium guides above 1; 1 is"),
        (["CONFIG", "--batch_size", "0"], "--batch_size: 0 must be from 1"),
        (["CONFIG", "--output", "setup.py"], "--output setup.py is a file"),
        (["CONFIG", "isg.weihgt=1"], "unknown key isg.weihgt; the nearest valid key is isg.weight"),
        (["CONFIG", "paths.dataset=no.json"], "data set no.json not found"),
        (["CONFIG", "paths.dataset=DATA"], "--num_samples 256: .* holds 6; say that many or fewer"),
    ],
)
def test_wrong_input_is_one_line(words, message, images, capsys):
    known = {"CONFIG": YAMLS["flux_senseflow"], "paths.dataset=DATA": f"paths.dataset={images}"}
    known["SD35"] = YAMLS["sd35_senseflow"]
    assert status_of(main, [known.get(word, word) for word in words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and re.search(message, line)


def test_help_needs_no_torch():
    code = (
        "import sys\nfrom senseflow.reconstruction_error.__main__ import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "--num_times" in result.stdout
