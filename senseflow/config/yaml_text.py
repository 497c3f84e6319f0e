"""YAML in which a value is what it looks like.

Of YAML 1.1, which PyYAML reads, an octal `0400` would be 256, `1:30` 90, a date a date and `1e-5`
text; a key that stands twice would have its last value. Here numbers are those of YAML 1.2, dates
are text, and a key that stands twice is an error, as is a text that grows without end by sections
that stand for sections (`*name`).
"""

import re
from pathlib import Path
from textwrap import shorten
from typing import Any

import yaml

MOST_KIB = 32  # of a file; the published configurations have 5
MOST_VALUES = 20_000  # of a file, where what `*name` stands for counts each time
_NUMBER = r"(?:0|[1-9][0-9_]*)"
_SCALARS = {  # tag -> what a plain scalar of it looks like, and begins with
    "merge": (r"<<", ["<"]),
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (
        r"yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF",
        list("yYnNtTfFoO"),
    ),
    "int": (rf"[-+]?{_NUMBER}|[-+]?0x[0-9a-fA-F]+|[-+]?0b[01]+", list("-+0123456789")),
    "float": (
        rf"[-+]?(?:{_NUMBER}?\.[0-9]+|{_NUMBER}\.)(?:[eE][-+]?[0-9]+)?"
        rf"|[-+]?{_NUMBER}[eE][-+]?[0-9]+"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
}


class _Loader(yaml.SafeLoader):
    """SafeLoader with these scalars and no key twice."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's, filled below

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.num_values = 0  # so far
        self.sizes: dict[int, int] = {}  # by node: the values in it, and itself

    def compose_node(self, parent: Any, index: Any) -> Any:
        """A node without a tag, or what an alias stands for."""
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if tag := getattr(event, "tag", None):
            raise _problem(f"the tag {tag}: write the value as it is, without one", event)
        before = self.num_values
        node: Any = super().compose_node(parent, index)
        if not isinstance(event, yaml.AliasEvent):
            self.num_values += 1
            self.sizes[id(node)] = self.num_values - before
        elif id(node) in self.sizes:
            self.num_values += self.sizes[id(node)]
        else:
            raise _problem(f"*{event.anchor} stands within itself", event)
        if self.num_values > MOST_VALUES:
            raise _problem(f"more than {MOST_VALUES} values: it is no configuration", event)
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        """A section whose keys are all different."""
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    again = f"the key {key.value} stands here a second time: delete one of them"
                    raise _problem(again, key)
                seen.add((key.tag, key.value))
        return node


def _problem(words: str, place: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=words, problem_mark=place.start_mark)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes what the loader would not read as text."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's, filled below


for _tag, (_pattern, _first) in _SCALARS.items():
    for _kind in (_Loader, _Dumper):
        _kind.add_implicit_resolver(
            f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), _first
        )


def read_yaml(file: Path) -> Any:
    """What a file holds; raises ValueError, naming it, when that is not YAML of at most 32 KiB."""
    # One byte more than allowed: its size may not be known, and is not worth a second look.
    with file.open("rb") as stream:
        data = stream.read(2**10 * MOST_KIB + 1)
    if len(data) > 2**10 * MOST_KIB:
        raise ValueError(f"{file} has more than {MOST_KIB} KiB: it is no configuration")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not valid YAML: it is not UTF-8 text ({error})") from error
    return parse_yaml(text, str(file))


def parse_yaml(text: str, where: str) -> Any:
    """What a text says; raises ValueError that begins with `where`, in one line."""
    try:
        return _apart(_Loader(text).get_single_data())
    except yaml.MarkedYAMLError as error:
        said = ", ".join(part for part in (error.problem, error.context) if part)
        mark = error.problem_mark
        at = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"{where} is not valid YAML: {at}{shorten(said, 200)}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is not valid YAML: {shorten(str(error), 200)}") from error
    except ValueError as error:
        raise ValueError(f"{where}: a number has more digits than can be read") from error
    except RecursionError:
        raise ValueError(f"{where}: its lists or sections are nested too deeply") from None


def _apart(tree: Any) -> Any:
    """A tree in which nothing stands in two places, so that an override changes one of them."""
    if isinstance(tree, dict):
        return {key: _apart(value) for key, value in tree.items()}
    return [_apart(value) for value in tree] if isinstance(tree, list) else tree


def dump_yaml(tree: Any) -> str:
    """A text that `parse_yaml` reads the same tree from."""
    return str(yaml.dump(tree, Dumper=_Dumper, sort_keys=False))
