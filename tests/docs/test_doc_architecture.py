"""The table of parts in docs/architecture.md is the house as it stands."""

import ast
import graphlib
import re
import sys

from doc_pages import ROOT, Page, tracked

ROW = re.compile(r"^\| `(\w+)` \| .+ \|$", re.MULTILINE)
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


def arrows_between(children_of: str, trees: dict[str, ast.Module]) -> dict[str, set[str]]:
    """Which files and folders right inside a package import which others, lazily or not."""
    inside = re.compile(re.escape(children_of) + r"\.(\w+)")
    graph: dict[str, set[str]] = {}
    for module, tree in trees.items():
        if (room := inside.match(module)) and room[1] != "__init__":
            used = {m[1] for name in imported(tree) if name in trees and (m := inside.match(name))}
            graph.setdefault(room[1], set()).update(used - {room[1]})
    return graph


def packages(trees: dict[str, ast.Module]) -> set[str]:
    """Every folder of the package that holds modules, by its dotted name."""
    return {module.rpartition(".")[0] for module in trees}


def test_rooms_import_only_rooms_below_them():
    floors, trees = ROW.findall(PAGE.text), modules()
    graph = arrows_between("senseflow", trees)
    assert len(floors) == len(set(floors)) and set(floors) == set(graph)
    for room, used in graph.items():
        above = {name for name in used if floors.index(name) < floors.index(room)}
        assert not above, f"{room} imports {above}, which docs/architecture.md has above it"


def test_at_most_21_rooms():
    assert len(arrows_between("senseflow", modules())) <= 21


def test_no_circle_of_folders():
    trees = modules()
    for package in packages(trees):
        graph = arrows_between(package, trees)
        assert list(graphlib.TopologicalSorter(graph).static_order()) is not None, package


def test_nothing_outside_knows_of_the_embedded_teachers():
    for module, tree in modules().items():
        if not module.startswith("senseflow.tiny."):
            assert not [name for name in imported(tree) if name.startswith("senseflow.tiny")], (
                module
            )


def test_core_imports_torch_alone():
    for module, tree in modules().items():
        if module.startswith("senseflow.core."):
            tops = {name.split(".")[0] for name in imported(tree)}
            assert tops <= {"torch", "senseflow", *sys.stdlib_module_names}, module


def test_no_circle_of_imports():
    trees = modules()
    graph = {
        module: {name for name in imported(tree, everywhere=False) if name in trees}
        for module, tree in trees.items()
    }
    assert list(graphlib.TopologicalSorter(graph).static_order())
