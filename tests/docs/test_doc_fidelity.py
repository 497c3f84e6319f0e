"""The numbers of docs/fidelity.md are those of the YAMLs and of the equations."""

import runpy

import pytest
from doc_pages import ROOT

from senseflow.config.config import load_config
from senseflow.core.anchors import shift_time
from senseflow.engine.inputs import read_setup
from senseflow.teachers.flux.family import FLUX

GENERATOR = runpy.run_path(str(ROOT / "docs" / "configuration.py"))
COLUMNS = ("SDXL", "SDXL DMD2", "SD3.5 M", "SD3.5 L", "FLUX")
PAGE = (ROOT / "docs" / "fidelity.md").read_text(encoding="utf-8")


def rows() -> dict[str, list[str]]:
    """The cells of the table of recipes, by key; what is in brackets is the release's."""
    table = PAGE.split(f"| | {' | '.join(COLUMNS)} |\n")[1].split("\n\n")[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {cells[0].strip("`"): cells[1:] for cells in lines if cells[0].startswith("`")}


@pytest.mark.parametrize("column", COLUMNS)
def test_recipes_have_the_numbers_of_the_table(column):
    config = load_config(ROOT / "configs" / GENERATOR["RECIPES"][column])
    found = rows()
    assert len(found) > 20
    for key, cells in found.items():
        section, name = key.split(".")
        value = GENERATOR["plain"](getattr(getattr(config, section), name))
        told = cells[COLUMNS.index(column)].split(" (")[0]
        assert told in ("", value), key
        assert told or column == "SDXL DMD2", key


def test_the_keys_that_give_the_releases_times_do():
    low, high = (shift_time(t, 3) for t in (21, 981))
    assert (low / 1000, high / 1000) == pytest.approx((0.0605, 0.9936), abs=1e-4)
    overrides = ["anchors.times=[1000, 904, 759, 512]", "anchors.shift=1"]
    config = load_config(ROOT / "configs/FLUX/flux_senseflow_tiny.yaml", overrides)
    assert read_setup(config, FLUX).anchors.times == pytest.approx((1000, 904, 759, 512))
