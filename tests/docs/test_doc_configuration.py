"""docs/configuration.md is what `python docs/configuration.py` writes, with every key in it."""

import dataclasses
import runpy
import typing

import pytest
import yaml
from doc_pages import ROOT

from senseflow.config.config import Config

GENERATOR = runpy.run_path(str(ROOT / "docs" / "configuration.py"))


def test_the_page_is_up_to_date():
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert page == GENERATOR["page"](), "run: python docs/configuration.py"


def test_every_key_has_a_meaning_and_a_row():
    page = (ROOT / "docs" / "configuration.md").read_text()
    comments = GENERATOR["read_comments"](*GENERATOR["SOURCES"])
    for section, cls in typing.get_type_hints(Config).items():
        if dataclasses.is_dataclass(cls):
            for field in dataclasses.fields(cls):
                meaning = comments[cls.__name__, field.name].replace("|", "\\|")
                (row,) = [
                    r for r in page.splitlines() if r.startswith(f"| `{section}.{field.name}` |")
                ]
                assert row.endswith(f"| {meaning} |") and len(meaning) > 5


@pytest.mark.parametrize("file", GENERATOR["RECIPES"].values())
def test_published_files_say_every_key(file):
    tree = yaml.safe_load((ROOT / "configs" / file).read_text())
    kinds = typing.get_type_hints(Config)
    for section, cls in kinds.items():
        if dataclasses.is_dataclass(cls) and section in tree:
            assert set(tree[section]) <= {f.name for f in dataclasses.fields(cls)}
    assert set(tree) <= set(kinds)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("ida.lam", "number, from 0 to 1, or `null`"),
        ("ema.decay", "number, above 0 and below 1, or `null`"),
        ("train.batch_size", "whole number, from 1 to 65536"),
        ("optimizer.betas", "pair of numbers, each at least 0 and below 1"),
        ("dmd.guidance", "pair of numbers, each from 0 to 100, [low, high]"),
        ("anchors.times", "list of numbers, each from 0 to 1000, falling"),
        ("train.resolution", "pair of whole numbers, each from 1 to 65535"),
    ],
)
def test_ranges_are_those_declared_beside_the_types(key, words):
    page = (ROOT / "docs" / "configuration.md").read_text()
    (row,) = [r for r in page.splitlines() if r.startswith(f"| `{key}` |")]
    assert row.split("|")[2].strip() == words
