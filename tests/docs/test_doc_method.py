"""docs/method.md names functions that are there, and equations that their docstrings name."""

import importlib
import inspect
import re
from functools import reduce

import pytest
from doc_pages import ROOT, Page, pages, tracked

METHOD = Page(ROOT / "docs" / "method.md")
LINE = re.compile(r"^\*\*In code\*\*: (.+?)\n\n", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"\[`(senseflow/[\w/]+\.py)`\]\(\.\./(senseflow/[\w/]+\.py)\)")
NAME = re.compile(r"`([A-Za-z_][\w.]*)`(?:\s+\(([^)]*)\))?")
NUMBER = re.compile(r"Eqs?\.\s+(\d+(?:-\d+)?)|Section\s+([\d.]*\d)")


def entries() -> list[tuple[str, str, str]]:
    """(file, name, source) of everything in the lines "In code"."""
    found = []
    for line in LINE.findall(METHOD.text):
        parts = FILE.split(line)
        for shown, linked, names in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
            assert shown == linked
            found += [(shown, m[1], " ".join((m[2] or "").split())) for m in NAME.finditer(names)]
    return found


def numbers(text: str) -> set[str]:
    """The equations and sections a text names: "Eqs. 13-15" is 13, 14 and 15."""
    found: set[str] = set()
    for equation, section in NUMBER.findall(text):
        first, _, last = equation.partition("-")
        found |= {str(n) for n in range(int(first), int(last or first) + 1)} if equation else set()
        found |= {f"Section {section}"} if section else set()
    return found


@pytest.mark.parametrize(("file", "name", "source"), entries())
def test_a_function_is_there_and_names_its_equation(file, name, source):
    module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
    found = reduce(getattr, name.split("."), module)
    assert inspect.getmodule(found) is module, f"{name} is only imported by {file}"
    assert inspect.getdoc(found)
    said = numbers(inspect.getdoc(found) or "")
    if source:
        assert numbers(source) and numbers(source) <= said | numbers(module.__doc__ or "")
    else:
        assert not said, f"{file} {name} names {said}, and the page does not"


def test_every_equation_of_core_is_on_the_page():
    listed = {(file, number) for file, _, source in entries() for number in numbers(source)}
    for file in tracked():
        if re.match(r"senseflow/core/\w+\.py", file):
            for number in numbers((ROOT / file).read_text()):
                assert (file, number) in listed, f"{number} of {file}"


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_equations_named_elsewhere_are_on_the_page(page: Page):
    listed = {number for _, _, source in entries() for number in numbers(source)}
    assert numbers(page.prose) - {"Section"} <= listed


def test_there_is_something_to_check():
    assert len(entries()) > 50 and {"9", "12", "15"} <= {
        number for *_, source in entries() for number in numbers(source)
    }
