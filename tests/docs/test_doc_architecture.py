"""The table of parts in docs/architecture.md is the house as it stands."""

import ast
import graphlib
import re
import sys

from doc_pages import ROOT, Page, tracked

ROW = re.compile(r"^\| ((?:`\w+`(?:, )?)+) \| (.+?) \| ((?:`\w+`(?:, )?)*) ?\|$", re.MULTILINE)
PAGE = Page(ROOT / "docs" / "architecture.md")


def modules() -> dict[str, ast.Module]:
    """Every module of the package by its dotted name."""
    files = (ROOT / name for name in tracked() if re.match(r"senseflow/.*\.py$", name))
    return {
        ".".join(file.relative_to(ROOT).with_suffix("").parts): ast.parse(file.read_text())
        for file in files
    }


def imported(tree: ast.Module, everywhere: bool = True) -> set[str]:
    """What a module imports; not `everywhere`: when it is imported itself."""
    nodes = ast.walk(tree) if everywhere else tree.body
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def part_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_imports_go_one_way():
    table, trees = ROW.findall(PAGE.text), modules()
    rules = [
        (re.findall(r"\w+", parts), set(re.findall(r"\w+", never))) for parts, _, never in table
    ]
    listed = {part for parts, _ in rules for part in parts}
    assert {"core", "models", "data", "distill", "engine", "trainer", "sampling", "tiny"} <= listed
    for parts, never in rules:
        for part in parts:
            mine = [m for m in trees if part_of(m) == part]
            assert mine, f"there is no part {part}"
            for module in mine:
                used = {part_of(name) for name in imported(trees[module]) if name in trees}
                assert not used & never, f"{module} imports {used & never}"


def test_nothing_outside_knows_of_the_embedded_teachers():
    for module, tree in modules().items():
        if part_of(module) != "tiny":
            assert not [name for name in imported(tree) if name.startswith("senseflow.tiny")], (
                module
            )


def test_core_imports_torch_alone():
    for module, tree in modules().items():
        if part_of(module) == "core":
            tops = {name.split(".")[0] for name in imported(tree)}
            assert tops <= {"torch", "senseflow", *sys.stdlib_module_names}, module


def test_no_circle_of_imports():
    trees = modules()
    graph = {
        module: {name for name in imported(tree, everywhere=False) if name in trees}
        for module, tree in trees.items()
    }
    assert list(graphlib.TopologicalSorter(graph).static_order())
