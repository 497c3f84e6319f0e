"""Writes docs/configuration.md from senseflow/config/{config,sections}.py and the published YAMLs.

A key's meaning is the comment beside its field, its range is declared in the field's type.
"""

import argparse
import ast
import dataclasses
import typing
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal

from senseflow.common.fields import PathText
from senseflow.config import recipes
from senseflow.config.config import REMOVED, Config, load_config
from senseflow.config.strict_yaml import is_union

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [ROOT / "senseflow" / "config" / name for name in ("config.py", "sections.py")]
PAGE = ROOT / "docs" / "configuration.md"
RECIPES = {
    "FLUX": "FLUX/flux_senseflow.yaml",
    "FLUX LoRA": "FLUX/flux_senseflow_lora.yaml",
    "SDXL": "sdxl/sdxl_senseflow.yaml",
    "SDXL DMD2": "sdxl/sdxl_dmd2.yaml",
    "SD3.5 M": "SD35/sd35_senseflow.yaml",
    "SD3.5 L": "SD35/sd35_large_senseflow.yaml",
    "FLUX.2": "FLUX2/flux2_klein_senseflow.yaml",
    "FLUX.2 LoRA": "FLUX2/flux2_klein_senseflow_lora.yaml",
    "Z-Image": "Z-Image/z_image_senseflow.yaml",
    "Qwen-Image": "Qwen-Image/qwen_image_senseflow.yaml",
    "FLUX R": "FLUX/flux_dancegrpo.yaml",
    "FLUX LoRA R": "FLUX/flux_dancegrpo_lora.yaml",
    "SDXL R": "sdxl/sdxl_dancegrpo.yaml",
    "SD3.5 M R": "SD35/sd35_dancegrpo.yaml",
    "FLUX.2 R": "FLUX2/flux2_klein_dancegrpo.yaml",
    "Z-Image R": "Z-Image/z_image_dancegrpo.yaml",
    "Qwen-Image R": "Qwen-Image/qwen_image_dancegrpo.yaml",
}
HEAD = """# Configuration: every key

<!-- `python docs/configuration.py` writes this page: do not edit it -->

A run is one YAML file; the command line overrides single keys, `key.sub=value`, such as
`isg.weight=0` or `dmd.guidance=[1,8]`. How it is read: [running.md](running.md#configuration); why
a recipe has its numbers: [fidelity.md](fidelity.md).

- **default**: what a key has that the file leaves out; "given": the file must say it.
- **recipes**: the value in the published YAMLs, the most common one first, then those that differ;
  M and L are SD3.5 Medium and Large, FLUX.2 is FLUX.2-klein-base, R the recipes with rewards.
- One number stands for both ends of a pair: `train.resolution: 1024`, `isg.guidance: 5`.
- A range has both its ends unless it says above or below; nothing takes nan or inf.
- Whatever goes beyond a key's own range (times off the teacher's clock, a margin without room, LoRA
  with another student's configuration) is an error that says what to do, before anything is loaded.
"""


def page() -> str:
    """The whole page."""
    configs = {name: load_config(ROOT / "configs" / file) for name, file in RECIPES.items()}
    comments = read_comments(*SOURCES)
    lines = [HEAD]
    for field in dataclasses.fields(Config):
        cls = typing.get_type_hints(Config)[field.name]
        if not dataclasses.is_dataclass(cls):
            lines += [f"`{field.name}`, at the top: {comments['Config', field.name]}: "]
            lines[-1] += ", ".join(f"`{name}`" for name in recipes.RECIPES) + "."
            continue
        lines += ["", f"## {field.name}", "", *summary(cls), ""]
        lines += ["| key | type | default | recipes | meaning |", "|---|---|---|---|---|"]
        lines += [row(cls, f, field.name, configs, comments) for f in dataclasses.fields(cls)]
    return "\n".join([*lines, *removed(), ""])


def removed() -> list[str]:
    """What older files may still say."""
    rows = [
        f"| `{name}` | `{plain(key.default)}` | {key.since} | {key.instead} |"
        for name, key in REMOVED.items()
    ]
    return [
        "",
        "## Removed keys",
        "",
        "A file that has one of these at its old default loads, and a line says so; another value",
        "is refused.",
        "",
        "| key | old default | since | instead |",
        "|---|---|---|---|",
        *rows,
    ]


def read_comments(*files: Path) -> dict[tuple[str, str], str]:
    """The comment on the line of each field of each class, by class and field."""
    found = {}
    for text in (file.read_text() for file in files):
        lines = text.splitlines()
        for cls in (node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)):
            for node in cls.body:
                if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                    comment = lines[node.end_lineno - 1][node.end_col_offset :].strip()
                    if comment.startswith("# "):
                        found[cls.name, node.target.id] = comment[2:].replace("None", "null")
    return found


def summary(cls: type) -> list[str]:
    """The docstring of a section."""
    return [" ".join(str(cls.__doc__).split()).replace("None", "null")]


def row(
    cls: type,
    field: dataclasses.Field[Any],
    section: str,
    configs: dict[str, Config],
    comments: dict[tuple[str, str], str],
) -> str:
    """One key."""
    hint = typing.get_type_hints(cls, include_extras=True)[field.name]
    default = "given" if field.default is dataclasses.MISSING else f"`{plain(field.default)}`"
    values = {name: plain(getattr(getattr(c, section), field.name)) for name, c in configs.items()}
    cells = [
        f"`{section}.{field.name}`",
        described(hint),
        default,
        in_recipes(values),
        comments[cls.__name__, field.name],
    ]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def described(hint: Any) -> str:
    """A type and its range in words."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        base, rule = args
        return described(base) if isinstance(rule, PathText) else f"{described(base)}, {rule}"
    if is_union(hint):
        inner = " or ".join(described(a) for a in args if a is not type(None))
        return f"{inner}{',' * (',' in inner and '`' not in inner)} or `null`"
    if origin is Literal:
        return ", ".join(f"`{plain(value)}`" for value in args)
    if origin is tuple:
        kind, comma, limits = described(args[0]).partition(", ")
        if args[-1] is Ellipsis:
            listed = "list of names" if args[0] is str else f"list of {kind}s"
        else:
            listed = f"pair of {kind}s"
        return f"{listed}, each {limits}" if comma else listed
    return {float: "number", int: "whole number", str: "text", bool: "`true`, `false`"}[hint]


def plain(value: Any) -> str:
    """A value as the YAML has it."""
    if isinstance(value, tuple):
        listed = "[" + ", ".join(plain(item) for item in value) + "]"
        return listed if len(listed) < 60 else f"{len(value)} names"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}".replace("e-0", "e-") if isinstance(value, float) else str(value)


def in_recipes(values: dict[str, str]) -> str:
    """The most common value, then the recipes that have others."""
    (common, _), *_ = Counter(values.values()).most_common()
    others: dict[str, list[str]] = {}
    for name, value in values.items():
        if value != common:
            others.setdefault(value, []).append(name)
    said = [f"`{common}`"] + [f"{', '.join(names)}: `{v}`" for v, names in others.items()]
    return "; ".join(said)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Write docs/configuration.md.")
    parser.add_argument("--output", type=Path, default=PAGE, help="(docs/configuration.md)")
    args = parser.parse_args()
    args.output.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
