"""Which folders a run may be trained in, by what lies in them."""

import argparse
from pathlib import Path

import pytest

from senseflow.config.recipes import RECIPES
from senseflow.engine.checkpoint_folders import MANIFEST, require_known_layout
from senseflow.launch.entry import check_arguments


def made(folder: Path, *files: str) -> Path:
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
    return folder


@pytest.mark.parametrize(
    "files",
    [
        (),
        ("notes.txt", "prompts/list.json"),
        ("config.yaml",),  # stopped before its first checkpoint
        ("config.yaml", "student/step_0000001/model.safetensors"),  # its checkpoints removed
        (f"checkpoints/step_0000001/{MANIFEST}", "checkpoints/step_0000002/__0_0.distcp"),
    ],
)
def test_a_run_and_a_folder_without_weights_are_known(tmp_path, files):
    require_known_layout(made(tmp_path / "run", *files))


@pytest.mark.parametrize(
    "file",
    [
        "senseflow_0003000.pth",
        "checkpoint_model_001000/pytorch_model.bin",
        "checkpoints/step_0000002/__0_0.distcp",
    ],
)
def test_another_layout_is_named_before_anything_is_loaded(tmp_path, file):
    made(tmp_path, file)
    with pytest.raises(ValueError, match="another layout") as error:
        require_known_layout(tmp_path)
    said = str(error.value)
    assert "\n" not in said and str(tmp_path) in said and "paths.initial" in said
    assert file.removesuffix("/__0_0.distcp") in said
    with pytest.raises(ValueError, match="another layout"):
        checked(tmp_path, "flux_senseflow")


def test_a_run_of_another_family_is_named_before_anything_is_loaded(tmp_path):
    """And is as it was; one without a checkpoint begins anew, one of the same family goes on."""
    text = Path("configs/Qwen-Image/qwen_image_senseflow.yaml").read_text()
    (tmp_path / "config.yaml").write_text(text)
    checked(tmp_path, "z_image_senseflow")
    made(tmp_path, f"checkpoints/step_0000001/{MANIFEST}")
    checked(tmp_path, "qwen_image_senseflow")
    said = "is a run of qwen_image_senseflow, whose networks z_image_senseflow does not have: name"
    with pytest.raises(ValueError, match=said):
        checked(tmp_path, "z_image_senseflow")
    assert (tmp_path / "config.yaml").read_text() == text
    (tmp_path / "config.yaml").write_text("recipe: of old")
    checked(tmp_path, "z_image_senseflow")


def checked(folder: Path, recipe: str) -> None:
    config = Path(RECIPES[recipe].config)
    args = argparse.Namespace(
        nodes=1, gpus=1, max_restarts=0, save_dir=folder, config=config, overrides=[]
    )
    check_arguments(args, RECIPES[recipe])
