"""The model card: every field, from a run's configuration, results and pictures; its usage."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import save_file
from students import SHIFT, Shipped, ours, run_script, save_student, script_of, shifted

from senseflow.config.config import load_config, save_config
from senseflow.export.ship import said_terms
from senseflow.export.terms import terms_of
from senseflow.teachers.flux.family import FLUX
from senseflow.teachers.folder import name_of
from senseflow.teachers.published import Terms
from senseflow.teachers.sd35.family import SD35_LARGE
from senseflow.teachers.sdxl.family import SDXL
from senseflow.weights.card import read_card

CONFIG = "configs/FLUX/flux_senseflow_tiny.yaml"
LICENSE = ("--base_model", "me/teacher", "--license", "mit")


@pytest.fixture(scope="module")
def shipped(tmp_path_factory) -> Shipped:
    """A student in its run folder, whose configuration is known."""
    run = tmp_path_factory.mktemp("run")
    shipped = save_student("flux", run / "student" / "step_0000200", iteration=200)
    config = load_config(CONFIG, ["paths.dataset=/home/someone/secret/data.json"])
    paths = dataclasses.replace(config.paths, pretrained_model=str(shipped.base))
    save_config(dataclasses.replace(config, paths=paths), run / "config.yaml")
    return shipped


def results(file: Path) -> Path:
    rows = [("teacher, 28 steps", 4.94), ("student, 4 steps", 7.32)]
    entries = [
        {
            "name": name,
            "metric": "fid_t",
            "value": value,
            "num_images": 300,
            "images": "/home/someone/images",
            "reference": "/home/someone/teacher_images",
            "weights": [{"file": "/home/someone/inception.pth", "sha256": "ab" * 32}],
        }
        for name, value in rows
    ]
    file.write_text(json.dumps(entries))
    return file


def pictures(folder: Path) -> list[Path]:
    folder.mkdir()
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (32, 32), colour).save(folder / f"{name}.png")
    (folder / "a.json").write_text(json.dumps({"prompt": "a red [7]", "seed": 3}))
    return [folder / "a.png", folder / "b.png"]


def test_it_says_everything(shipped, tmp_path):
    out, files = tmp_path / "four_steps", pictures(tmp_path / "pictures")
    flags = ["--form", "pipeline", "--results", results(tmp_path / "results.json"), "--row"]
    flags += ["student, 4 steps", "--samples", *files, "--name", "Digits in 4 steps", *LICENSE]
    assert shipped.export(out, *flags) == 0
    card = ModelCard.load(out / "README.md")
    data = card.data.to_dict()
    expected = {
        "license": "mit",
        "base_model": "me/teacher",
        "base_model_relation": "finetune",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "steps": 4,
        "guidance_scale": 1.0,
    }
    assert {key: data[key] for key in expected} == expected
    assert data["sigmas"] == pytest.approx(shifted(SHIFT))
    assert all(len(repr(sigma)) <= 10 for sigma in data["sigmas"])  # float32's digits
    assert {"text-to-image", "senseflow", "flux"} <= set(data["tags"])
    (result,) = data["model-index"][0]["results"]
    assert (
        result["metrics"][0]["value"] == 7.32
        and data["model-index"][0]["name"] == "Digits in 4 steps"
    )
    for said in (
        "# Digits in 4 steps",
        "Distilled by [SenseFlow](https://arxiv.org/abs/2506.00523)",
        "| iterations | 200 of 400; the student moves once in 2 (TTUR) |",
        "| data | `data.json` |",
        "| IDA | lambda 0.97 |",
        "| ISG | weight 1, teacher's guidance 1 to 8 |",
        "| EMA | off |",
        "| adversary | vfm, weight 2 |",
        "| sigmas | 1, 0.9045, 0.7595, 0.5128 |",
        "| student, 4 steps | 7.32 |",
        "![a red (7)](samples/00.png)\n*a red (7)*, seed 3",
        "![a sample](samples/01.png)",
        "sampler `lcm`, scheduler `simple`",
        "ModelSamplingFlux with max_shift and base_shift both 1.15 (the shift e^1.15 = 3.158",
        "## Responsible use",
        "under its licence, `mit`",
    ):
        assert said in card.text or said in card.content, said
    assert (out / "samples" / "00.png").read_bytes() == files[0].read_bytes()
    assert "/home/" not in card.content and str(tmp_path) not in card.content


def test_without_results_and_config_it_says_so(tmp_path):
    shipped = save_student("sdxl", tmp_path / "step_0000020", eta=0.7)
    assert shipped.export(tmp_path / "out") == 0
    card = ModelCard.load(tmp_path / "out" / "README.md")
    data = card.data.to_dict()
    assert "noise for the next. Rewards trained cps with eta 0.7, between it and " in card.text
    assert data["timesteps"] == [999, 749, 499, 249] and data["guidance_scale"] == 0
    assert "model-index" not in data and "license" not in data
    assert "base_model" not in data and "base_model_relation" not in data
    assert "Distilled by [SenseFlow](https://arxiv.org/abs/2506.00523) or [DMD2](" in card.text
    assert "Not measured." in card.text and "config.yaml was not at hand" in card.text
    assert "licence was not stated" in card.text


def test_a_student_of_dmd2_credits_dmd2(tmp_path):
    shipped = save_student("sdxl", tmp_path / "step_0000020", recipe="sdxl_dmd2")
    assert shipped.export(tmp_path / "out") == 0
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert "Distilled by [DMD2](https://arxiv.org/abs/2405.14867); iteration" in card.text
    assert "SenseFlow" not in card.text.partition("## Evaluation")[0]
    assert "dmd2" in card.data.tags and "senseflow" not in card.data.tags


@pytest.mark.parametrize(
    ("form", "library", "tagged"),
    [
        ("component", None, False),
        ("pipeline", "diffusers", False),
        ("comfyui", "diffusion-single-file", True),
        ("original", "diffusion-single-file", False),
    ],
)
def test_the_hub_is_told_what_reads_it(form, library, tagged, shipped, tmp_path):
    """By the names of its libraries; a component alone is no pipeline of diffusers."""
    out = tmp_path / "out"
    assert shipped.export(out, "--form", form, "--name", "In 4 steps") == 0
    card = ModelCard.load(out / "README.md")
    data = card.data.to_dict()
    assert data.get("library_name") == library and ("comfyui" in data["tags"]) == tagged
    if library == "diffusion-single-file":
        assert "`out.safetensors`" in card.text


@pytest.mark.parametrize(
    ("terms", "said"),
    [
        (Terms(None, "cc-by-4.0"), "lacks the teacher's name: say --base_model before"),
        (Terms("me/teacher", None), "lacks the teacher's licence: say --license before"),
        (Terms(None, None), "name and licence: say --base_model and --license before"),
        (Terms("me/teacher", "mit"), "names the teacher me/teacher, licence mit"),
    ],
)
def test_what_the_card_lacks_is_named_alone(terms, said):
    assert said in said_terms(terms)


def test_a_teacher_is_called_by_what_says_something(tmp_path):
    at = tmp_path / "models--me--my-flux" / "snapshots" / "0ef5fff789c832c5c7f4e127f94c8b54bbcced44"
    assert name_of(at) == "me/my-flux"
    assert name_of(Path("assets/tiny/sd35_medium/pipeline")) == "sd35_medium"
    assert name_of(tmp_path / "FLUX.1-dev") == "FLUX.1-dev"


def test_the_public_teachers_licences_and_no_others(tmp_path, monkeypatch):
    """By the number of parameters: another network of the kind is not under them."""
    nothing = Terms(None, None)
    monkeypatch.setattr("senseflow.export.terms.num_parameters", lambda _: 11_901_408_320)
    found = terms_of(FLUX, tmp_path, nothing)
    assert found.base_model == "black-forest-labs/FLUX.1-dev"
    assert found.license_name == "flux-1-dev-non-commercial-license"
    assert terms_of(FLUX, tmp_path, Terms("me/fine", None)).license == "other"
    assert terms_of(FLUX, tmp_path, Terms(None, "mit")) == Terms(found.base_model, "mit")
    monkeypatch.setattr("senseflow.export.terms.num_parameters", lambda _: 600_000)
    assert terms_of(FLUX, tmp_path, nothing) == nothing
    assert SDXL.published.terms.license == "openrail++"
    assert "community" in (SD35_LARGE.published.terms.license_name or "")


def test_the_component_cards_script_draws_our_image(shipped, tmp_path, monkeypatch):
    """The scheduler is set by the script; the run's own folder names the recipe."""
    out = tmp_path / "student"
    assert shipped.export(out, "--base_model", shipped.base, "--license", "mit") == 0
    mine = ours(shipped, tmp_path / "ours")
    theirs, _ = run_script(script_of(out), out, monkeypatch)
    assert np.array_equal(theirs, mine)


def test_a_guided_student_is_fed_its_guidance(tmp_path, monkeypatch):
    shipped = save_student("flux", tmp_path / "step_0000020", guidance=2.5)
    assert shipped.export(tmp_path / "out", "--form", "pipeline") == 0
    text = (tmp_path / "out" / "README.md").read_text()
    assert "guidance_scale=2.5" in text and "The node FluxGuidance with 2.5" in text
    mine = ours(shipped, tmp_path / "ours")
    theirs, _ = run_script(script_of(tmp_path / "out"), tmp_path / "out", monkeypatch)
    assert np.array_equal(theirs, mine)


def test_untypical_anchors_are_told_as_sigmas(tmp_path, monkeypatch):
    anchors = (1.0, 0.8, 0.7, 0.2)
    shipped = save_student("sd35_medium", tmp_path / "step_0000020", anchors=anchors)
    assert shipped.export(tmp_path / "out", "--form", "pipeline") == 0
    text = (tmp_path / "out" / "README.md").read_text()
    assert "sigmas=[1.0, 0.8, 0.7, 0.2]" in text and "No scheduler of ComfyUI" in text
    mine = ours(shipped, tmp_path / "ours")
    theirs, _ = run_script(script_of(tmp_path / "out"), tmp_path / "out", monkeypatch)
    assert np.array_equal(theirs, mine)


def test_wrong_flags_are_one_line(shipped, tmp_path, capsys):
    out, no = tmp_path / "out", tmp_path / "no.png"
    no.write_text("no picture")
    cut = tmp_path / "cut.png"
    Image.effect_noise((64, 64), 50).save(cut)
    cut.write_bytes(cut.read_bytes()[:-500])
    for flags, said in (
        (["--license", "other"], "--license other needs --license_name"),
        (["--license_name", "x"], "are for --license other"),
        (["--samples", no], "no.png is not a picture"),
        (["--samples", cut], "cut.png is not a picture"),
        (["--samples", tmp_path / "gone.png"], "gone.png is not a file"),
        (["--results", no], "is not a results file"),
        (["--row", "x"], "--row x is none of the results' rows (none)"),
        (["--name", " "], "--name is empty"),
        (["--link"], "--link is for --form pipeline"),
        (["--dry_run"], "are for --push_to_hub"),
    ):
        assert shipped.export(out, *flags) == 2
        lines = capsys.readouterr().err.splitlines()
        assert lines[-1].startswith("error: ") and said in lines[-1], lines
    assert not out.exists()
    assert no.exists() and not list(tmp_path.glob(".partial*"))


def test_a_run_of_which_the_student_alone_was_kept(tmp_path):
    kept = save_student("flux", tmp_path / "run" / "student" / "step_0000020")
    run = Shipped(tmp_path / "run", kept.base, kept.family, kept.anchors)
    assert run.export(tmp_path / "out") == 0
    assert read_card(tmp_path / "out").iteration == 20


def test_a_folder_without_card_or_of_another_family(shipped, tmp_path, capsys):
    plain = tmp_path / "plain"
    shutil.copytree(shipped.folder, plain)
    (plain / "senseflow.json").unlink()
    sdxl = shipped.base.parents[1] / "sdxl" / "pipeline"
    for folder, base, said in (
        (plain, shipped.base, "has no senseflow.json"),
        (shipped.folder, sdxl, "is a student of family flux, not sdxl"),
        (shipped.folder, tmp_path, "is not a diffusers pipeline folder"),
    ):
        moved = Shipped(folder, base, shipped.family, shipped.anchors)
        assert moved.export(tmp_path / "out") == 2
        assert said in capsys.readouterr().err.splitlines()[-1]
    save_file({}, tmp_path / "empty.safetensors")
    assert not (tmp_path / "out").exists()
