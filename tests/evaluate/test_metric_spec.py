"""A metric is one file and its place in `specs.METRICS`: all else is read from its spec."""

import importlib.util
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from doc_pages import ROOT, Page
from image_folders import pictures, write_images
from metric_parts import error_of, score

from senseflow.evaluate.__main__ import main
from senseflow.evaluate.metrics import specs
from senseflow.evaluate.table import columns

BRIGHTNESS = '''
"""Brightness: how light an image is."""

from pathlib import Path

from senseflow.distill.scorers import metric

LAMP = metric.Flag[Path]("--lamp", "file", "a number: what is dark", required=True)
BORDER = metric.Flag[int]("--border", "pixels", "not looked at (1)", 1)


def prepare(given: metric.Given) -> metric.Prepared:
    lamp, border = given[LAMP], given[BORDER]

    def open_it(machine: metric.Machine) -> metric.Judge:
        import numpy
        import torch

        dark = float(lamp.read_text())
        return metric.Judge(
            "without a border",
            lambda picture: torch.from_numpy(numpy.array(picture))[border:, border:].double(),
            lambda pixels, prompts: pixels.mean((1, 2, 3)) - dark,
        )

    return metric.Prepared("a photometer", [lamp], {"border": border}, open_it)


SPEC = metric.Spec(
    metric.Column("brightness", "Brightness", metric.DOWN, 1),
    about="mean grey level",
    needs="prompts",
    prepare=prepare,
    flags=(LAMP, BORDER),
)
'''


@pytest.fixture
def lamp(tmp_path, monkeypatch):
    """The file of weights of a metric that someone added: a file, and its place in METRICS."""
    file = tmp_path / "brightness.py"
    file.write_text(BRIGHTNESS)
    spec = importlib.util.spec_from_file_location("senseflow.evaluate.metrics.brightness", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    first, *others = specs.METRICS
    monkeypatch.setattr(specs, "METRICS", (first, module.SPEC, *others))
    (tmp_path / "lamp.txt").write_text("10")
    return tmp_path / "lamp.txt"


def test_a_metric_that_was_added_is_scored(lamp, tmp_path, capsys):
    images = write_images(tmp_path / "images", size=(32, 32))
    flags = ("--metrics", "brightness", "--lamp", lamp)
    (entry,) = score(images, tmp_path / "r.json", *flags, "--border", 2)
    expected = np.mean([np.mean(np.array(picture)[2:, 2:]) - 10 for picture in pictures(images)])
    assert entry["value"] == pytest.approx(expected, rel=1e-12)
    assert entry["settings"] == {"border": 2, "dtype": "float32"}
    assert entry["weights"][0]["file"] == str(lamp) and entry["model"] == "a photometer"
    said = error_of(capsys, images, tmp_path / "r.json", "--metrics", "brightness")
    assert "brightness needs --lamp" in said
    said = error_of(capsys, images, tmp_path / "r.json", *flags[:3], tmp_path / "no")
    assert "--lamp" in said and "is not a file" in said
    assert "mean grey level" in help_of("score", capsys) and "--border PIXELS" in help_of(
        "score", capsys
    )


def test_its_column_stands_beside_the_published_rows(lamp, tmp_path):
    images = write_images(tmp_path / "images", size=(32, 32))
    (entry,) = score(images, tmp_path / "r.json", "--metrics", "brightness", "--lamp", lamp)
    line = ["table", str(tmp_path / "r.json"), "--published", "flux", "--output_dir", str(tmp_path)]
    assert main(line) == 0
    rows = [line.split(" | ") for line in (tmp_path / "table.md").read_text().splitlines()]
    place = [re.split("<", head)[0] for head in rows[0]].index("Brightness ↓")
    assert place == 2  # after FID-T, as in METRICS
    values = {row[0]: row[place] for row in rows if len(row) == len(rows[0])}
    assert values["| student"] == f"{entry['value']:.1f}"
    assert values["| SenseFlow-FLUX, 4 NFE<sup>†</sup>"] == "–"


def help_of(command: str, capsys) -> str:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    return capsys.readouterr().out


def test_every_published_value_has_a_column_of_ours():
    published = json.loads((ROOT / "senseflow" / "evaluate" / "published.json").read_text())
    assert set(published["metrics"]) <= columns().keys()
    assert len({spec.name for spec in specs.METRICS}) == len(specs.METRICS)


def test_the_page_on_metrics_is_what_their_specs_say():
    """A row for each in their order, with what it is; a flag is named where it first counts."""
    page = Page(ROOT / "docs" / "evaluation_metrics.md").text
    rows = re.findall(r"^\| `(\S+)` \| (.+?) \| (.+) \|$", page, re.MULTILINE)
    assert [(name, about) for name, about, _ in rows] == [
        (spec.name, spec.about) for spec in specs.METRICS
    ]
    told: set[str] = set()
    for spec, (_, about, rest) in zip(specs.METRICS, rows, strict=True):
        for flag in spec.flags:
            if flag.name not in told:
                assert f"`{flag.name}" in about + rest, (spec.name, flag.name)
                told.add(flag.name)


def test_flags_and_tables_answer_without_torch(tmp_path):
    (tmp_path / "r.json").write_text("[]")
    code = (
        "import sys\n"
        "from senseflow.evaluate.__main__ import build_parser, main\n"
        "build_parser()\n"
        f"assert main(['table', '{tmp_path}/r.json', '--output_dir', '{tmp_path}']) == 0\n"
        "heavy = {'torch', 'numpy', 'PIL', 'open_clip', 'transformers', 'diffusers', 'timm'}\n"
        "sys.exit(', '.join(heavy & sys.modules.keys()) or 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
