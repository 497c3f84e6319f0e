"""A sixth family, as a user would add one: a folder under senseflow/teachers and five files.

It has conventions that none of the others has: no pooled vector, a mask of the prompts' padding, a
shift that depends on the number of steps, and guidance that is counted from 0.
"""

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from python import PYTHON
from safetensors.torch import load_file

from senseflow.common.files import ROOT

OWN = "senseflow/teachers/made_up"
TABLE = "senseflow/config/recipes.py"
YAML = "configs/made_up/made_up.yaml"
SHELL = "exp_made_up/train_made_up.sh"
SCRIPT = "scripts_made_up/test_made_up.py"
TRAINER = "senseflow/trainer/trainer_made_up.py"
IMPORT = "from senseflow.teachers.made_up.family import MADE_UP"
LINE = f'Recipe("made_up", MADE_UP, "vfm", "configs/made_up", "{SHELL}")'


def contents(folder: Path) -> dict[str, str]:
    """A digest of every file, by its path."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def replaced(text: str, *pairs: tuple[str, str]) -> str:
    for old, new in pairs:
        assert old in text, old
        text = text.replace(old, new)
    return text


def add(house: Path) -> None:
    """What a user writes."""
    shutil.copytree(ROOT / "tests/parts/made_up_family", house / OWN)
    (house / OWN / "__init__.py").touch()
    table = replaced(
        (house / TABLE).read_text(),
        ("from senseflow.teachers.sd35", f"{IMPORT}\nfrom senseflow.teachers.sd35"),
        ("_TABLE = (\n", f"_TABLE = (\n    {LINE},\n"),
    )
    (house / TABLE).write_text(table)
    tree = yaml.safe_load((ROOT / "configs/SD35/sd35_senseflow_tiny.yaml").read_text())
    tree |= {"recipe": "made_up", "adversarial": {"kind": "none", "weight": 0}}
    tree["paths"] |= {"pretrained_model": "/path/to/made-up", "dataset": "data.json"}
    tree["train"] |= {"iter_num": 2, "batch_size": 2, "save_interval": 2, "log_interval": 1}
    tree["isg"]["margin"] = 20
    tree["lr_scheduler"] = {}
    medium = {
        SHELL: (ROOT / "exp_sd35/train_SD35_senseflow.sh").read_text(),
        SCRIPT: (ROOT / "scripts_sd35/test_senseflow_sd35.py").read_text(),
        TRAINER: (ROOT / "senseflow/trainer/trainer_sd35_senseflow.py").read_text(),
    }
    names = {SHELL: "trainer_sd35_senseflow", SCRIPT: "sd35.family", TRAINER: "sd35_senseflow"}
    news = {SHELL: "trainer_made_up", SCRIPT: "made_up.family", TRAINER: "made_up"}
    written = {file: replaced(text, (names[file], news[file])) for file, text in medium.items()}
    written[SCRIPT] = replaced(written[SCRIPT], ("SD35", "MADE_UP"))
    for file, text in {**written, YAML: yaml.safe_dump(tree)}.items():
        (house / file).parent.mkdir(parents=True, exist_ok=True)
        (house / file).write_text(text)


def save_teacher(sd35: Path, folder: Path) -> None:
    """SD3's parts with the T5 in the first place, and no CLIP."""
    for part in ("transformer", "scheduler", "vae"):
        shutil.copytree(sd35 / part, folder / part)
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(sd35 / f"{part}_3", folder / part)
    index = json.loads((sd35 / "model_index.json").read_text())
    for part in ("text_encoder", "tokenizer"):
        index[part] = index.pop(f"{part}_3")
        del index[f"{part}_2"]
    index["_class_name"] = "MadeUpPipeline"
    (folder / "model_index.json").write_text(json.dumps(index))


def save_data(folder: Path) -> None:
    prompts = ["a red seven", "two", "a blue one on white", "nine"]
    for number in range(len(prompts)):
        noise = np.random.default_rng(number).integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
    names = [f"{number}.png" for number in range(len(prompts))]
    lists = {"keys": names, "image_paths": names, "prompts": prompts}
    (folder / "data.json").write_text(json.dumps(lists))


def run(house: Path, *words: object) -> str:
    variables = {"PYTHONPATH": str(house), "PYTHON": PYTHON, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        list(map(str, words)),
        cwd=house,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def rows_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(row) for row in (folder / "stats.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def house(sd35_folder, tmp_path_factory) -> Path:
    """A copy of the package to which the family was added, a teacher of it and a data set."""
    folder = tmp_path_factory.mktemp("house")
    unwanted = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "senseflow", folder / "senseflow", ignore=unwanted)
    before = contents(folder)
    add(folder)
    after = contents(folder)
    changed = {name for name in after if after[name] != before.get(name)}
    outside = {name for name in changed if not name.startswith(OWN)}
    assert outside == {TABLE, YAML, SHELL, SCRIPT, TRAINER}
    assert before.keys() <= after.keys()
    save_teacher(sd35_folder, folder / "teacher")
    save_data(folder)
    return folder


ALL = """
import runpy, sys
from senseflow.cache.__main__ import main as cache
from senseflow.export.__main__ import main as export
from senseflow.plan.__main__ import main as plan

def sample(*words):
    sys.argv = ["script", *words]
    try:
        runpy.run_path("{script}", run_name="__main__")
    except SystemExit as end:
        return end.code

teacher = "paths.pretrained_model=teacher"
small = ["--made_up_ckpt", "teacher", "--prompt", "two", "--height", "16", "--width", "16"]
codes = [
    sample("--checkpoint", "run", "--output_dir", "images", *small),
    sample("--teacher", "--steps", "2", "--output_dir", "theirs", *small),
    plan(["--config", "{config}", "--gpus", "2", "--output", "plan.json"]),
    cache(["{config}", teacher, "--output", "cache"]),
    export(["run", "--output", "shipped", "--license", "mit", "--base_model", "nobody/made-up"]),
]
print(codes)
sys.argv = ["trainer", "--worker", "{config}", "cached", teacher, "paths.cache=cache"]
runpy.run_module("senseflow.trainer.trainer_made_up", run_name="__main__")
"""


def test_it_is_trained_sampled_planned_cached_and_exported(house):
    run(house, "sh", SHELL, 1, 1, YAML, "run", "paths.pretrained_model=teacher")
    rows = rows_of(house / "run")
    assert [row["iteration"] for row in rows] == [1, 2]
    card = json.loads((house / "run/student/step_0000002/senseflow.json").read_text())
    assert card["family"] == "made_up"
    assert card["anchors"] == pytest.approx([1.0, 0.9, 0.75, 0.5])  # shift 1 + 8 / 4

    said = run(house, PYTHON, "-c", ALL.format(script=SCRIPT, config=YAML))
    assert str([0] * 5) in said.splitlines()
    (image,) = (house / "images").glob("0*.json")
    assert json.loads(image.read_text())["sigmas"] == pytest.approx(card["anchors"])
    (image,) = (house / "theirs").glob("0*.json")
    assert json.loads(image.read_text())["guidance"] == 4.0
    plan = json.loads((house / "plan.json").read_text())
    assert "nobody/made-up" in json.dumps(plan)
    (file,) = (house / "cache").glob("prompts*.safetensors")
    kept = load_file(file)
    assert set(kept) == {"prompt_embeds", "mask"} and len(kept["mask"]) == 5  # and the null prompt
    assert (house / "shipped/README.md").read_text().count("MadeUpPipeline") > 1

    for mine, other in zip(rows, rows_of(house / "cached"), strict=True):
        for name in mine.keys() & {"loss/dmd", "loss/fake", "loss/isg"}:
            assert mine[name] == pytest.approx(other[name], rel=1e-5)
