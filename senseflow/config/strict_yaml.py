"""YAML files read strictly into frozen dataclasses.

An unknown key, a missing one, a wrong type or a value that breaks the rule declared beside its type
is a ValueError that names the file, the key and the nearest valid key. A removed key is passed
over, and said, where it stands at its old default.
"""

import dataclasses
import difflib
import logging
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from senseflow.common.fields import check, short
from senseflow.config.yaml_text import parse_yaml, read_yaml

T = TypeVar("T")

logger = logging.getLogger(__name__)


WORDS = {  # for types
    float: "a number",
    int: "a whole number",
    str: "text",
    bool: "true or false",
    dict: "a section",
}


@dataclass(frozen=True)
class Removed:
    """A key that is read no longer: what it was, and what stands in its place."""

    default: Any  # the old one, which every run now has
    since: str  # the first version without it
    instead: str  # what is done now, for those who had said something else


def read_tree(path: Path, overrides: list[str] | None = None) -> dict[str, Any]:
    """The sections of a YAML file, with `key.sub=value` overrides; raises ValueError, OSError."""
    if not path.is_file():
        raise ValueError(f"config file not found: {path}{' is a folder' * path.is_dir()}")
    tree = read_yaml(path)
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: expected sections such as 'train:', got {short(tree)}")
    given: dict[str, str] = {}
    for override in overrides or []:
        _apply_override(tree, override)
        key, _, value = override.partition("=")
        if given.setdefault(key.strip(), value) != value:  # as in any command, but not in silence
            logger.info("%s is given twice: the last, %s, counts", key.strip(), short(value))
        given[key.strip()] = value
    return tree


def build(
    cls: type[T], tree: dict[str, Any], path: Path, removed: Mapping[str, Removed] | None = None
) -> T:
    """The tree of `read_tree(path)`, which is used up, as a tree of frozen dataclasses.

    removed: by name, the keys of older files. Raises ValueError for what does not fit the
    dataclasses, and for a removed key with another value than its old default.
    """
    try:
        passed_over = _without(removed or {}, tree)
        read = typing.cast(T, _build(cls, tree, ""))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if passed_over:
        logger.info("%s: %s: settings no longer, passed over", path, ", ".join(passed_over))
    return read


def read_strictly(cls: type[T], path: Path) -> T:
    """A YAML file as a tree of frozen dataclasses; raises ValueError for what does not fit."""
    return build(cls, read_tree(path), path)


def _without(removed: Mapping[str, Removed], tree: dict[str, Any]) -> list[str]:
    """Take the removed keys that stand at their old default out of a tree; their names."""
    taken = []
    for name, key in removed.items():
        section, leaf = name.split(".")
        here = tree.get(section)
        if not isinstance(here, dict) or leaf not in here:
            continue
        if (value := here.pop(leaf)) != key.default:
            raise ValueError(
                f"{name}: {short(value)} is no setting since {key.since}: {key.instead}; delete "
                "the key"
            )
        taken.append(name)
    return taken


def _apply_override(tree: dict[str, Any], override: str) -> None:
    name, separator, text = override.partition("=")
    key = name.strip()  # of 'train.iter_num = 5', which a file may say with spaces too
    if not separator or not key:
        raise ValueError(
            f"override {short(override)} is not of the form key.sub=value, without spaces around ="
        )
    *sections, leaf = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ValueError(f"override {short(override)}: {section[:60]} is not a section")
    tree[leaf] = parse_yaml(text, f"override {short(override)}")


@cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


def _build(cls: type, tree: Any, prefix: str) -> Any:
    if not isinstance(tree, dict):
        raise ValueError(f"{prefix.rstrip('.')}: expected a section, got {short(tree)}")
    hints = _hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in tree:
        if key not in fields:
            said, name = prefix + short(key).strip("'"), str(key)[:100]
            near = difflib.get_close_matches(name, fields, n=1, cutoff=0.0)[0]
            raise ValueError(f"unknown key {said}; the nearest valid key is {prefix}{near}")
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in tree:
            raise ValueError(f"missing key {prefix}{name}")
    return cls(**{key: _convert(value, hints[key], prefix + key) for key, value in tree.items()})


def _convert(value: Any, hint: Any, key: str) -> Any:
    """A value of the YAML as a field's type has it; raises ValueError for one that does not fit."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin is Annotated:
        base, rule = args
        value = _convert(value, base, key)
        check(key, value, rule)
        return value
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, key + ".")
    if is_union(hint):
        inner = next(arg for arg in args if arg is not type(None))
        return None if value is None else _convert(value, inner, key)
    if origin is dict and isinstance(value, dict):
        return {str(k): _convert(v, args[1], f"{key}.{k}") for k, v in value.items()}
    if origin is Literal:
        if not any(value == arg and type(value) is type(arg) for arg in args):  # 1 is not true
            words = ", ".join(str(arg).lower() if arg in (True, False) else arg for arg in args)
            raise ValueError(f"{key}: {short(value)} is none of {words}")
        return value
    if origin is tuple:
        return _convert_tuple(value, args, key)
    if hint is float and type(value) is int and abs(value) < 10**308:
        return float(value)
    if type(value) is not hint:
        text = "the text " * isinstance(value, str)
        raise ValueError(f"{key}: expected {WORDS[origin or hint]}, got {text}{short(value)}")
    if value == "":
        raise ValueError(f"{key} is empty")
    return value


def _convert_tuple(value: Any, args: tuple[Any, ...], key: str) -> tuple[Any, ...]:
    """A list; one number stands for both ends of a pair (a fixed guidance, a square size)."""
    many = len(args) == 2 and args[1] is Ellipsis
    if isinstance(value, int | float) and not isinstance(value, bool) and not many:
        value = [value] * len(args)
    if not isinstance(value, list) or (not many and len(value) != len(args)):
        wanted = "a list" if many else f"a list of {len(args)}"
        raise ValueError(f"{key}: expected {wanted}, got {short(value)}")
    kinds = [args[0]] * len(value) if many else args
    return tuple(
        _convert(item, kind, f"{key}[{i}]")
        for i, (item, kind) in enumerate(zip(value, kinds, strict=True))
    )


def is_union(hint: Any) -> bool:
    """Whether a type is `X | None`, which Python writes in two ways."""
    return typing.get_origin(hint) in (types.UnionType, typing.Union)
