"""A run's configuration beside the YAML its recipe is published with."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from senseflow.common.fields import leaves
from senseflow.common.files import ROOT
from senseflow.config.yaml_text import read_yaml

Tree = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """One value of a run; `published` is None where it is the recipe's own."""

    section: str  # "" for a key outside of all sections
    key: str
    value: str
    published: str | None
    own: bool  # the YAML the run set out from has another value
    known: bool  # False for a key that the published YAML does not have


@dataclass(frozen=True)
class Comparison:
    """All settings, and what they are compared with."""

    settings: list[Setting]
    published: Path | None  # None: no YAML of this recipe was found
    start: Path | None  # the nearest YAML of the recipe, from which the run set out


def compare(config: Tree, configs: Path = ROOT / "configs") -> Comparison:
    """Compare a run's configuration with its recipe's YAMLs in `configs`.

    The published YAML of a recipe has its name; others of the recipe may stand beside it, and only
    what differs from the nearest of them is the run's own.
    """
    recipes = _recipes(configs, config.get("recipe"))
    values = leaves_of(config)
    published = next((file for file in recipes if file.stem == config.get("recipe")), None)
    start = min(
        recipes, key=lambda file: (_distance(values, recipes[file]), file.name), default=None
    )
    there = recipes[published] if published else values
    begun = recipes[start] if start else values
    settings = []
    for key, value in values.items():
        own = key in begun and _plain(begun[key]) != _plain(value)
        other = None
        if key in there and _plain(there[key]) != _plain(value):
            other = shown(there[key])
        settings.append(Setting(*key, shown(value), other, own, key in there))
    return Comparison(settings, published, start)


def leaves_of(tree: Tree) -> dict[tuple[str, str], Any]:
    """Each value by section and key; deeper sections have dotted names."""
    split = ((key.rpartition("."), value) for key, value in leaves(tree).items())
    return {(section, key): value for (section, _, key), value in split}


def shown(value: Any) -> str:
    """A value as YAML has it in one line."""
    if isinstance(value, list):
        return "[" + ", ".join(shown(item) for item in value) + "]"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    number = _plain(value)
    return f"{number:g}" if isinstance(number, float) else str(value)


def _plain(value: Any) -> Any:
    """Equal for what the configuration reads alike: "1e-5" and 1e-05, 512 and [512, 512]."""
    if isinstance(value, list):
        items = [_plain(item) for item in value]
        return items[0] if len(items) == 2 and items[0] == items[1] else items
    if isinstance(value, bool) or value is None:
        return value
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return str(value)


def _distance(leaves: dict[tuple[str, str], Any], other: dict[tuple[str, str], Any]) -> int:
    return sum(_plain(value) != _plain(other.get(key, value)) for key, value in leaves.items())


def _recipes(folder: Path, recipe: Any) -> dict[Path, dict[tuple[str, str], Any]]:
    """The YAMLs of a recipe, and their leaves."""
    found = {}
    for file in sorted(folder.glob("*/*.yaml")):
        tree = read_yaml(file)
        if isinstance(tree, dict) and tree.get("recipe") == recipe:
            found[file] = leaves_of(tree)
    return found
