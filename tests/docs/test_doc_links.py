"""Links and pictures of the documentation lead somewhere; other sites are not asked."""

import ast
import importlib

import pytest
from doc_pages import CHANGELOG, ROOT, Page, pages

PAGES = (*pages(), CHANGELOG)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page: Page):
    wrong = [target for _, target in page.links if not leads_somewhere(page, target)]
    assert not wrong


def leads_somewhere(page: Page, target: str) -> bool:
    """A file of the repository, and a heading of it where one is named."""
    if target.startswith(("https://", "http://")):
        return True
    path, _, anchor = target.partition("#")
    file = (page.file.parent / path).resolve() if path else page.file
    if not (file.exists() and file.is_relative_to(ROOT)):
        return False
    return not anchor or (file.suffix == ".md" and anchor in Page(file).anchors)


def test_pictures_are_pictures():
    for page in PAGES:
        for is_picture, target in page.links:
            if is_picture and not target.startswith("https://"):
                head = (page.file.parent / target).read_bytes()[:8]
                assert head.startswith((b"\x89PNG", b"\xff\xd8")), f"{page.name}: {target}"


def test_every_page_is_in_the_index():
    index = Page(ROOT / "docs" / "README.md")
    listed = {(index.file.parent / target).resolve() for _, target in index.links}
    assert {page.file for page in pages()} - {index.file} <= listed


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 250


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_python_examples_compile_and_import_what_there_is(page: Page):
    for block in page.blocks:
        if block.language == "python":
            for node in ast.walk(ast.parse(block.text)):
                if isinstance(node, ast.ImportFrom):
                    module = importlib.import_module(str(node.module))
                    for alias in node.names:
                        assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"
