"""The commands of the embedded teachers, as a user types them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from PIL import Image
from python import PYTHON
from teacher_parts import settings_of

from senseflow.teachers.flux2.family import FLUX2
from senseflow.teachers.qwen_image.family import QWEN_IMAGE
from senseflow.teachers.z_image.family import Z_IMAGE
from senseflow.tiny import build, compare, measure, pictures
from senseflow.tiny.families import Method, Sampler
from senseflow.tiny.qwen_image import QWEN_IMAGE_LENGTH
from senseflow.tiny.text import QWEN_LENGTH

ROOT = Path(__file__).parents[2]
ASSETS = ROOT / "assets" / "tiny"
COMMON, FLUX = ASSETS / "common", ASSETS / "flux" / "pipeline"


def run(module: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [PYTHON, "-m", module, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )


@pytest.fixture
def call(monkeypatch):
    """Runs a command's main in this process."""

    def call_main(module, *arguments, status: int = 0) -> None:
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
        assert module.main() == status

    return call_main


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    teacher = FluxTransformer2DModel.from_pretrained(FLUX / "transformer")
    network = FluxTransformer2DModel.from_config({**teacher.config, "guidance_embeds": False})
    network.load_state_dict(teacher.state_dict(), strict=False)
    folder = tmp_path_factory.mktemp("student")
    network.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("module", [pictures, build, measure, compare])
def test_help_gives_an_example(module, call, capsys):
    with pytest.raises(SystemExit, match="0"):
        call(module, "--help")
    assert "example: python -m senseflow.tiny" in capsys.readouterr().out


def test_measure_writes_table_results_and_picture(tmp_path, student):
    finished = run(
        "senseflow.tiny.measure",
        *("--pipeline", FLUX, "--common", COMMON),
        *("--student", f"mine={student}", "--output", tmp_path / "report"),
        *("--num_prompts", "8", "--seeds", "2", "--columns", "4", "--processes", "2"),
        *("--steps", "8", "4"),
    )
    rows = json.loads((tmp_path / "report" / "results.json").read_text())
    assert len(rows) == 15
    assert {"mine, 8 steps, euler", "teacher, 8 steps, euler"} <= set(rows)
    assert rows["mine, 8 steps, x0"] != rows["mine, 4 steps, x0"]
    assert rows["teacher, 28 steps (reference)"]["fid_t"] == pytest.approx(0, abs=1e-3)
    assert {"mine, 4 steps, x0", "mine, 4 steps, euler", "mine, 1 step"} <= set(rows)
    assert rows["mine, 4 steps, x0"] == rows["untrained, 4 steps, x0"]
    table = (tmp_path / "report" / "table.md").read_text()
    assert table.strip() == finished.stdout.strip()
    assert Image.open(tmp_path / "report" / "comparison.png").size[0] > 4 * 64


@pytest.mark.long
@pytest.mark.parametrize("name", ["sd35_medium", "sdxl"])  # FLUX by the others
def test_measure_takes_every_family(name, tmp_path, call):
    pipeline = ASSETS / name / "pipeline"
    call(
        measure,
        *("--pipeline", pipeline, "--common", COMMON, "--output", tmp_path),
        *("--student", f"mine={pipeline}", "--num_prompts", 4, "--seeds", 1, "--columns", 2),
    )
    rows = json.loads((tmp_path / "results.json").read_text())
    sampler = {"sd35_medium": "x0", "sdxl": "lcm"}[name]
    assert len(rows) == 15
    assert rows[f"mine, 4 steps, {sampler}"] == rows[f"untrained, 4 steps, {sampler}"]
    assert rows["mine, 1 step"]["fid_t"] != rows["teacher, 1 step"]["fid_t"]


def test_compare_has_a_line_per_pair(tmp_path, student, call, capsys):
    call(
        compare,
        *("--pair", "plain", FLUX, student, "--pair", "guided", FLUX, FLUX),
        *("--common", COMMON, "--output", tmp_path),
        *("--num_prompts", "6", "--seeds", "1", "--columns", "2"),
    )
    summary = capsys.readouterr().out.strip().splitlines()
    assert [line.split(" |")[0] for line in summary] == [
        "|",
        "|---|---|---|---|---|---|---|---|---|---|",
        "| plain",
        "| guided",
    ]
    assert (tmp_path / "table.md").read_text().startswith("\n".join(summary))
    (rows,) = json.loads((tmp_path / "results.json").read_text()).values()
    shown = f"{rows['plain, 4 steps, x0']['fid_t']:.2f}"
    assert summary[2].split(" | ")[7] == shown
    assert rows["guided, 4 steps, euler"] == rows["teacher, 4 steps, euler"]
    assert Image.open(tmp_path / "comparison.png").size[1] > 6 * 64


def architecture(config: Path) -> dict:
    """A config.json without what the autoencoder measures of its own latents."""
    measured = ("scaling_factor", "shift_factor")
    return {k: v for k, v in json.loads(config.read_text()).items() if k not in measured}


@pytest.mark.parametrize(
    "target",
    [
        *("flux", "sdxl"),
        *(pytest.param(n, marks=pytest.mark.long) for n in ("common", "sd35_medium", "sd35_large")),
    ],
)
def test_quick_build_makes_the_shipped_files(target, tmp_path, call):
    output = tmp_path / target
    output.mkdir()
    (output / "README.md").write_text("kept")
    (output / "old").touch()
    call(build, target, "--quick", "--output", output, "--common", COMMON)
    assert (output / "README.md").read_text() == "kept"
    files, shipped = (
        {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        for folder in (output, ASSETS / target)
    )
    assert files == shipped
    for name in files:
        if name.endswith("config.json"):
            assert architecture(output / name) == architecture(ASSETS / target / name), name
    # A finished stage is not done again: the same bytes come out of the same work folder.
    again = ("--work", tmp_path / f"{target}.building", "--output", tmp_path / "again")
    call(build, target, *again, "--common", COMMON)
    assert (tmp_path / "again" / "SHA256SUMS").read_text() == (output / "SHA256SUMS").read_text()


@pytest.mark.long
@pytest.mark.parametrize(
    ("target", "family", "length"),
    [
        ("flux2_klein", FLUX2, QWEN_LENGTH),
        ("z_image", Z_IMAGE, QWEN_LENGTH),
        ("qwen_image", QWEN_IMAGE, QWEN_IMAGE_LENGTH),
    ],
)
def test_a_quick_build_of_a_teacher_that_is_not_shipped(target, family, length, tmp_path, call):
    output = tmp_path / target
    call(build, target, "--quick", "--output", output, "--common", COMMON)
    settings = settings_of(output / "pipeline", (32, 32), length)
    family.require(settings)
    sampler = Sampler(output / "pipeline", ["a red seven left of a blue two on white"] * 2)
    # A student's few steps are not the teacher's where that has a clock of its own.
    sampler.networks["student"] = sampler.networks["teacher"]
    for steps in (4, 1):
        pictures = sampler.draw(Method("teacher", steps, "euler"), seed=0)
        assert pictures.shape == (2, 3, 32, 32) and pictures.isfinite().all()
    sampler.draw(Method("student", 4, "x0"), seed=0)
    anchors = family.anchors(settings, (1000, 750, 500, 250))
    stops = torch.tensor([*family.sampled_at(family.path(settings), anchors), 0.0])
    torch.testing.assert_close(sampler.pipeline.scheduler.sigmas, stops, atol=1e-6, rtol=0)


def test_a_part_of_the_stages_leaves_the_output_alone(tmp_path, call):
    output = tmp_path / "common"
    call(build, "common", "--quick", "--stages", "judge", "--output", output)
    assert not output.exists()
    assert (tmp_path / "common.building" / "judge" / "stage.json").exists()


def test_a_stage_is_built_beside_the_others_of_an_output(tmp_path, call):
    output = shutil.copytree(COMMON, tmp_path / "common")
    call(build, "common", "--quick", "--stages", "reward", "--output", output)
    was, found = (
        {line.split("  ")[1]: line for line in (folder / "SHA256SUMS").read_text().splitlines()}
        for folder in (COMMON, output)
    )
    assert was.keys() == found.keys()
    changed = {name for name in was if was[name] != found[name]}
    assert {"reward/model.safetensors", "stages.json"} <= changed
    assert all(name == "stages.json" or name.startswith("reward/") for name in changed)
    old, new = (json.loads((folder / "stages.json").read_text()) for folder in (COMMON, output))
    assert list(old) == list(new) and {k for k in old if old[k] != new[k]} == {"reward"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["flux", "--stages", "vae"], "no stage 'vae', but flow, refine, guidance"),
        (["sdxl"], "no vae/ in"),
    ],
)
def test_build_refuses(arguments, message, tmp_path, call, capsys):
    call(build, *arguments, "--output", tmp_path / "out", status=2)
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_build_knows_its_targets(tmp_path, call, capsys):
    with pytest.raises(SystemExit, match="2"):
        call(build, "pixart", "--output", tmp_path / "out")
    assert "invalid choice: 'pixart'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        (measure, ["--pipeline", COMMON], "no model_index.json"),
        (measure, ["--pipeline", FLUX, "--student", "mine"], "NAME=CKPT"),
        (measure, ["--pipeline", FLUX, "--student", "teacher=x"], "a name of its own"),
        (measure, ["--pipeline", FLUX, "--student", "mine=nowhere"], "nowhere does not exist"),
        (compare, ["--pair", "a", FLUX, "x", "--pair", "a", FLUX, "y"], "a name of its own"),
    ],
)
def test_measuring_refuses(module, arguments, message, tmp_path, call, capsys):
    call(module, *arguments, "--common", COMMON, "--output", tmp_path / "report", status=2)
    said = capsys.readouterr().err.splitlines()[-1]  # after diffusers' bars
    assert said.startswith("error: ") and message in said
    assert not (tmp_path / "report").exists()
