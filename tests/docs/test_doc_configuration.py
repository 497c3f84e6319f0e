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
    comments = GENERATOR["read_comments"](GENERATOR["SOURCE"])
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
        ("ida.lam", "0 to 1"), ("ema.decay", "between 0 and 1"), ("train.batch_size", "1 or more"),
        ("optimizer.lr", "above 0"), ("isg.weight", "0 or more"), ("lora.rank", "1 or more"),
        ("train.keep_last", "0 or more"),
    ],
)  # fmt: skip
def test_legal_ranges_are_those_the_loader_enforces(key, words):
    page = (ROOT / "docs" / "configuration.md").read_text()
    (row,) = [r for r in page.splitlines() if r.startswith(f"| `{key}` |")]
    assert words in row.split("|")[2]
