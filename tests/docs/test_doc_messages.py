"""The messages that docs/troubleshooting.md answers are messages of the package."""

import ast
import re
from functools import cache

import pytest
from doc_pages import ROOT, Page, tracked

PAGE = Page(ROOT / "docs" / "troubleshooting.md")
MESSAGE = re.compile(r"^\| `([^`]*[ .][^`]*)`(?:,? [^|]*)? \|", re.MULTILINE)
OF_OTHERS = ("operator torchvision", "The NVIDIA driver", "NCCL error", "Python 3.11 or newer")


@cache
def strings() -> str:
    """Every text of the package, with what is filled in left out."""
    found = []
    for name in tracked():
        if re.match(r"senseflow/.*\.py$", name):
            for node in ast.walk(ast.parse((ROOT / name).read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = (v.value if isinstance(v, ast.Constant) else "\0" for v in node.values)
                    found.append("".join(parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return "\n".join(found).replace("%s", "\0").replace("%d", "\0")


def messages() -> list[str]:
    spans = [m for m in MESSAGE.findall(PAGE.text) if not m.startswith(OF_OTHERS)]
    levers = re.compile(r"[\w.]+=\S+|[\w.]+(/[\w.]+)?|python -m .*")
    return [span for span in spans if not levers.fullmatch(span)]


def test_there_are_messages():
    assert len(messages()) >= 12


@pytest.mark.parametrize("message", messages())
def test_a_message_is_one_of_the_package(message):
    """Its words between "..." follow each other in one text."""
    parts = [re.escape(part.strip()) for part in message.split("...") if part.strip(" :")]
    pattern = r"\s*[^\n]*?\s*".join(parts)
    assert re.search(pattern, strings())
