"""The command line of the page: which folders it takes, and what it answers to wrong ones."""

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from studios import CASES, save_exported, save_run

from senseflow.app import __main__ as app


@pytest.fixture(scope="module")
def folders(flux_folder, sdxl_folder, tmp_path_factory) -> dict[str, Path]:
    """By name; `index` is a pipeline folder with nothing but its index."""
    place = tmp_path_factory.mktemp("folders")
    (place / "index").mkdir()
    (place / "index" / "model_index.json").write_text(json.dumps({"_class_name": "OtherPipeline"}))
    (place / "empty").mkdir()
    return {
        "flux": flux_folder,
        "sdxl": sdxl_folder,
        "run": save_run(CASES["flux"], flux_folder, place),
        "exported": save_exported(CASES["flux"], flux_folder, place),
        "index": place / "index",
        "empty": place / "empty",
        "nowhere": place / "nowhere",
    }


def parsed(folders: dict[str, Path], line: str):
    """The flags of a line with the folders' names in braces."""
    return app.build_parser().parse_args(line.format(**folders).split())


@pytest.mark.parametrize(
    ("line", "base", "checkpoint", "with_teacher"),
    [
        ("--pipeline {flux} --checkpoint {run}", "flux", "run", True),
        ("--pipeline {flux} --checkpoint {run} --student_only", "flux", "run", False),
        ("--pipeline {exported}", "exported", "exported", False),
        ("--pipeline {exported} --checkpoint {exported}", "exported", "exported", False),
        ("--pipeline {exported} --teacher {flux}", "flux", "exported", True),
        ("--pipeline {exported} --checkpoint {run} --student_only", "exported", "run", False),
    ],
)
def test_which_folder_is_what(folders, line, base, checkpoint, with_teacher):
    family, paths, teacher_is_read = app.choose_folders(parsed(folders, line))
    assert family.name == "flux"
    assert (paths.base, paths.checkpoint) == (folders[base], folders[checkpoint])
    assert teacher_is_read == with_teacher


def test_the_page_begins_with_a_prompt_to_draw(folders):
    begins = [parsed(folders, "--pipeline {flux}" + more).prompt for more in ("", " --prompt x")]
    assert begins == ["a red fox in the snow", "x"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--pipeline {nowhere}", "there is no such folder"),
        ("--pipeline {empty}", "no model_index.json"),
        ("--pipeline {index}", "is a OtherPipeline"),
        ("--pipeline {flux}", "--checkpoint is missing"),
        ("--pipeline {flux} --checkpoint {nowhere}", "does not exist"),
        ("--pipeline {flux} --checkpoint {run} --config {nowhere}", "is not a file"),
        ("--pipeline {flux} --checkpoint {run} --teacher {flux}", "--pipeline is the teacher"),
        ("--pipeline {exported} --teacher {sdxl}", "is SDXL, --pipeline"),
        ("--pipeline {exported} --teacher {empty}", "--teacher"),
        ("--pipeline {exported} --teacher {flux} --student_only", "exclude each other"),
        ("--pipeline {exported} --checkpoint {run}", "is an exported student"),
    ],
)
def test_wrong_folders_are_answered_in_one_line(folders, capsys, line, said):
    assert app.main(line.format(**folders).split()) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and error.startswith("error: ")


def test_a_checkpoint_of_another_family(folders, sdxl_folder, capsys):
    line = ["--pipeline", str(sdxl_folder), "--checkpoint", str(folders["run"]), "--port", free()]
    assert app.main(line) == 2
    assert "is a student of family flux" in capsys.readouterr().err


def test_a_checkpoint_that_does_not_fit(folders, flux_folder, tmp_path, capsys):
    cut = Path(shutil.copytree(folders["run"], tmp_path / "run"))
    (weights,) = cut.rglob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    line = ["--pipeline", str(flux_folder), "--checkpoint", str(cut), "--port", free()]
    assert app.main(line) == 2
    assert str(weights) in capsys.readouterr().err


def free() -> str:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind((app.HOST, 0))
        return str(probe.getsockname()[1])


def test_a_port_that_is_taken(folders, capsys):
    with socket.socket() as other:
        other.bind((app.HOST, 0))
        other.listen()
        port = other.getsockname()[1]
        line = f"--pipeline {{flux}} --checkpoint {{run}} --port {port}"
        assert app.main(line.format(**folders).split()) == 2
    error = capsys.readouterr().err
    assert f"--port {port} cannot be used" in error and f"--port {port + 1}" in error


def test_a_host_that_is_none():
    with pytest.raises(ValueError, match="--host no host cannot be used"):
        app.check_port("no host", 1)


def test_gradio_is_asked_for_when_missing(monkeypatch):
    monkeypatch.setattr(app.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install .*\[app\]"):
        app.check_gradio()


def test_help_and_wrong_flags_need_neither_torch_nor_gradio():
    code = (
        "import sys; from senseflow.app import __main__ as app\n"
        "assert app.main(['--pipeline', 'nowhere']) == 2\n"
        "try: app.main(['--help'])\nexcept SystemExit as stop: assert stop.code == 0\n"
        "assert not {'torch', 'diffusers', 'gradio'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
