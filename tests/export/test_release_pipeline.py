"""A whole pipeline folder: plain diffusers draws our scripts' images, at the trained anchors."""

import inspect
import json
import shutil
from pathlib import Path
from unittest.mock import Mock

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from students import ANCHORS, PROMPT, Shipped, ours, run_script, save_student, script_of

from senseflow.export.folders import files_of
from senseflow.weights.card import read_card


@pytest.fixture(scope="module", params=ANCHORS)
def shipped(request, tmp_path_factory) -> Shipped:
    return save_student(request.param, tmp_path_factory.mktemp(request.param) / "step_0000020")


@pytest.fixture(scope="module")
def folder(shipped, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shipped") / "student"
    assert shipped.export(folder, "--form", "pipeline") == 0
    return folder


def test_the_cards_script_draws_our_image_at_the_anchors(shipped, folder, tmp_path, monkeypatch):
    mine = ours(shipped, tmp_path / "ours", seed=7)
    script = script_of(folder).replace("manual_seed(0)", "manual_seed(7)")
    theirs, names = run_script(script, folder, monkeypatch)
    assert np.array_equal(theirs, mine) and mine.shape == (32, 32, 3)
    times = names["pipe"].scheduler.timesteps.tolist()
    scale = 1 if shipped.family.name == "sdxl" else 1000
    assert times == pytest.approx([scale * anchor for anchor in shipped.anchors], rel=1e-6)
    pipe, component = names["pipe"], shipped.family.component
    kind = getattr(diffusers, shipped.family.network_class)
    pipe.register_modules(**{component: kind.from_pretrained(shipped.base / component)})
    torch.manual_seed(7)
    teacher = np.array(pipe(PROMPT, **names["call"]).images[0])
    assert np.abs(teacher.astype(int) - mine).max() > 8


def test_also_at_another_size(shipped, folder, tmp_path, monkeypatch):
    """Also by our script on the exported folder itself, as base and as checkpoint."""
    itself = Shipped(folder, folder, shipped.family, shipped.anchors)
    mine = ours(itself, tmp_path / "ours", "--height", 48, "--width", 64, seed=3)
    script = script_of(folder).replace("manual_seed(0)", "manual_seed(3)")
    script = script.replace("height=32, width=32", "height=48, width=64")
    theirs, _ = run_script(script, folder, monkeypatch)
    assert np.array_equal(theirs, mine) and mine.shape == (48, 64, 3)


def test_fewer_steps_than_it_was_trained_for(shipped, tmp_path, monkeypatch):
    """A folder that draws in 2 is our script's --steps 2 of the student of 4."""
    mine = ours(shipped, tmp_path / "ours", "--steps", 2, seed=0)
    assert shipped.export(tmp_path / "two", "--form", "pipeline", "--steps", 2) == 0
    theirs, _ = run_script(script_of(tmp_path / "two"), tmp_path / "two", monkeypatch)
    assert np.array_equal(theirs, mine)
    component = read_card(tmp_path / "two" / shipped.family.component)
    assert component.anchors == shipped.anchors[::2]
    assert "draws in 2 steps" in (tmp_path / "two" / "README.md").read_text()


@pytest.mark.parametrize("kind", ["Image2Image", "Inpainting"])
def test_beginning_with_a_picture_stays_on_the_anchors(kind, folder, shipped):
    """diffusers' own pipelines for it, made of the exported one, drop the first steps."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe = getattr(diffusers, f"AutoPipelineFor{kind}").from_pipe(pipe)
    pipe.set_progress_bar_config(disable=True)
    # the embedded ones have 8 channels, and the pipelines for inpainting ask for the published
    if channels := {"sdxl": 4, "sd35": 16}.get(shipped.family.name):
        getattr(pipe, shipped.family.component).register_to_config(in_channels=channels)
    seen: list[float] = []
    step = pipe.scheduler.step

    def watched(output, timestep, *args, **kwargs):
        seen.append(float(timestep))
        return step(output, timestep, *args, **kwargs)

    pipe.scheduler.step = watched
    call = dict(height=32, width=32, num_inference_steps=4, guidance_scale=1.0, strength=0.75)
    call |= {} if kind == "Image2Image" else {"mask_image": Image.new("L", (32, 32), 255)}
    call |= {"max_sequence_length": 12} if shipped.family.tokenizer else {}
    pipe(PROMPT, image=Image.new("RGB", (32, 32), "red"), **call)
    scale = 1 if shipped.family.name == "sdxl" else 1000
    assert seen == pytest.approx([scale * anchor for anchor in shipped.anchors[1:]], rel=1e-6)


def test_its_parts(shipped, folder):
    """The teacher's own beside the student, and a scheduler of a stock class."""
    index = json.loads((folder / "model_index.json").read_text())
    base = json.loads((shipped.base / "model_index.json").read_text())
    changed = {key for key in base if base[key] != index[key]}
    assert index.keys() == base.keys() and changed <= {"scheduler"}
    others = [f for f in shipped.base.rglob("*.*") if f.is_file()]
    parts = {shipped.family.component, "scheduler"}
    copied = [
        f
        for f in others
        if f.parent.name not in parts and f.name not in ("model_index.json", "README.md")
    ]
    assert len(copied) > 5
    for file in copied:
        assert (folder / file.relative_to(shipped.base)).read_bytes() == file.read_bytes()
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    known = inspect.signature(getattr(diffusers, scheduler["_class_name"])).parameters
    assert {key for key in scheduler if not key.startswith("_")} <= known.keys()
    if shipped.family.name == "sdxl":
        assert scheduler["_class_name"] == "LCMScheduler"
        assert scheduler["original_inference_steps"] == 4 and scheduler["beta_start"] == 0.00085
    else:
        assert scheduler["_class_name"] == "FlowMatchEulerDiscreteScheduler"
        assert scheduler["stochastic_sampling"] and not scheduler["use_dynamic_shifting"]


def test_links_stand_for_the_teachers_files_alone(tmp_path):
    """And only its scheduler, student and card are written."""
    shipped = save_student("flux", tmp_path / "step_0000020")
    assert shipped.export(tmp_path / "out", "--form", "pipeline", "--link") == 0
    links = {
        f.relative_to(tmp_path / "out") for f in (tmp_path / "out").rglob("*") if f.is_symlink()
    }
    parts = {link.parts[0] for link in links}
    assert parts == {"text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae"}
    file = Path("text_encoder_2/model.safetensors")
    assert (tmp_path / "out" / file).resolve() == (shipped.base / file).resolve()
    assert len(links) == sum(len(list((shipped.base / part).iterdir())) for part in parts)


@pytest.mark.parametrize("cut", ["no vae", "cut vae", "full disk"])
def test_it_is_whole_or_not_there(cut, tmp_path, monkeypatch, capsys):
    shipped = save_student("flux", tmp_path / "step_0000020")
    base = tmp_path / "base"
    shutil.copytree(shipped.base, base)
    shipped = Shipped(shipped.folder, base, shipped.family, shipped.anchors)
    file = base / "vae" / "diffusion_pytorch_model.safetensors"
    if cut == "no vae":
        shutil.rmtree(base / "vae")
    elif cut == "cut vae":
        file.write_bytes(file.read_bytes()[:-10])
    else:
        full = OSError(28, "No space left on device")
        monkeypatch.setattr("senseflow.export.folders.shutil.copyfile", Mock(side_effect=full))
    assert shipped.export(tmp_path / "out", "--form", "pipeline") == 2
    said = capsys.readouterr().err.splitlines()[-1]
    expected = {"no vae": "vae is not there", "cut vae": f"{file} is damaged"}
    assert said.startswith("error: ") and expected.get(cut, "No space left on device") in said
    assert not [p.name for p in tmp_path.iterdir() if "out" in p.name]


def test_ctrl_c_leaves_nothing(tmp_path, monkeypatch, capsys):
    shipped = save_student("flux", tmp_path / "step_0000020")
    pressed = Mock(side_effect=KeyboardInterrupt)
    monkeypatch.setattr("senseflow.export.folders.shutil.copyfile", pressed)
    assert shipped.export(tmp_path / "out", "--form", "pipeline") == 130
    assert capsys.readouterr().err.endswith("stopped: --output is whole or not there\n")
    assert [p.name for p in tmp_path.iterdir()] == ["step_0000020"]


def test_only_what_diffusers_reads_is_copied(tmp_path):
    wanted = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    spare = [
        "model.fp16.safetensors", "model.safetensors.index.fp16.json", "pytorch_model.bin",
        "pytorch_model.bin.index.json", "model.onnx", "flax_model.msgpack", ".cache",
    ]  # fmt: skip
    for name in [*wanted, *spare]:
        (tmp_path / name).write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    assert sorted(file.name for file in files_of(tmp_path)) == wanted
    for name in [*wanted[1:], "model.safetensors.index.fp16.json"]:
        (tmp_path / name).unlink()
    # what stands alone is read under the name that diffusers looks for
    copies = {file.name: str(name) for file, name in files_of(tmp_path).items()}
    assert copies == {"config.json": "config.json", "model.fp16.safetensors": "model.safetensors"}
    (tmp_path / "model.fp16.safetensors").unlink()
    assert sorted(file.name for file in files_of(tmp_path)) == ["config.json", "pytorch_model.bin"]
