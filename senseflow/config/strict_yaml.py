"""YAML files read strictly into frozen dataclasses.

An unknown key, a missing one or a wrong type is a ValueError that names the file, the key and the
nearest valid key. A removed key is passed over, and said, where it stands at its old default.
"""

import dataclasses
import difflib
import logging
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

T = TypeVar("T")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Removed:
    """A key that is read no longer: what it was, and what stands in its place."""

    kind: Any  # its type, as an annotation says it
    default: Any  # the old one, which every run now has
    since: str  # the first version without it
    instead: str  # what is done now, for those who had said something else


def read_strictly(
    cls: type[T],
    path: Path,
    overrides: list[str] | None = None,
    removed: Mapping[str, Removed] | None = None,
) -> T:
    """A YAML file, with `key.sub=value` overrides, as a tree of frozen dataclasses.

    removed: by name, the keys of older files. Raises ValueError for a file that is none, for what
    does not fit the dataclasses, and for a removed key with another value than its old default.
    """
    if not path.is_file():
        raise ValueError(f"config file not found: {path}{' is a folder' * path.is_dir()}")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: expected sections such as 'train:', got {type(tree).__name__}")
    for override in overrides or []:
        _apply_override(tree, override)
    try:
        passed_over = _without(removed or {}, tree)
        read = typing.cast(T, _build(cls, tree, ""))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if passed_over:
        logger.info("%s: %s: settings no longer, passed over", path, ", ".join(passed_over))
    return read


def _without(removed: Mapping[str, Removed], tree: dict[str, Any]) -> list[str]:
    """Take the removed keys that stand at their old default out of a tree; their names."""
    taken = []
    for name, key in removed.items():
        section, leaf = name.split(".")
        here = tree.get(section)
        if not isinstance(here, dict) or leaf not in here:
            continue
        value = here.pop(leaf)
        if _convert(value, key.kind, name) != key.default:
            raise ValueError(
                f"{name}: {value!r} is no setting since {key.since}: {key.instead}; delete the key"
            )
        taken.append(name)
    return taken


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ValueError(f"override {override!r} is not of the form key.sub=value")
    *sections, leaf = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ValueError(f"override {override!r}: {section} is not a section")
    try:
        tree[leaf] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"override {override!r} is not valid YAML: {error}") from error


def _build(cls: type, tree: Any, prefix: str) -> Any:
    if not isinstance(tree, dict):
        raise ValueError(f"{prefix.rstrip('.')}: expected a section, got {tree!r}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in tree:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.0)[0]
            raise ValueError(f"unknown key {prefix}{key}; the nearest valid key is {prefix}{near}")
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in tree:
            raise ValueError(f"missing key {prefix}{name}")
    return cls(**{key: _convert(value, hints[key], prefix + key) for key, value in tree.items()})


def _convert(value: Any, hint: Any, key: str) -> Any:
    if hint is Any:
        return value
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, key + ".")
    if origin is types.UnionType:
        inner = next(arg for arg in args if arg is not type(None))
        return None if value is None else _convert(value, inner, key)
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{key}: expected a section, got {value!r}")
        return {str(k): _convert(v, args[1], f"{key}.{k}") for k, v in value.items()}
    if origin is Literal:
        if value not in args:
            raise ValueError(f"{key}: {value!r} is none of {', '.join(map(str, args))}")
        return value
    if origin is tuple:
        return _convert_tuple(value, args, key)
    return _convert_scalar(value, hint, key)


def _convert_tuple(value: Any, args: tuple[Any, ...], key: str) -> tuple[Any, ...]:
    """A list; one number stands for both ends of a pair (a fixed guidance, a square size)."""
    many = len(args) == 2 and args[1] is Ellipsis
    if isinstance(value, int | float) and not isinstance(value, bool) and not many:
        value = [value] * len(args)
    if not isinstance(value, list) or (not many and len(value) != len(args)):
        wanted = "a list" if many else f"a list of {len(args)}"
        raise ValueError(f"{key}: expected {wanted}, got {value!r}")
    kinds = [args[0]] * len(value) if many else args
    return tuple(
        _convert(item, kind, f"{key}[{i}]")
        for i, (item, kind) in enumerate(zip(value, kinds, strict=True))
    )


def _convert_scalar(value: Any, hint: type, key: str) -> Any:
    if hint is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)  # PyYAML reads 1e-5 as a string
        except ValueError:
            pass
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ValueError(f"{key}: expected {hint.__name__}, got {value!r}")
    return value
