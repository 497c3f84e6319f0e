"""A student's card, `senseflow.json` beside its weights: how it was trained, how it is sampled."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from senseflow.common.fields import FieldError, check_range
from senseflow.common.files import read_json
from senseflow.core.levels import counted

CARD = "senseflow.json"  # beside a student's weights: how it was trained
CARD_FORMAT = 1
MOST_SIDE = 2**16 - 1  # pixels
WORDS = {str: "a text", int: "a whole number", float: "a number"}


@dataclass(frozen=True)
class Rule:
    """What a value of the card may be."""

    kind: type
    least: float = 0
    most: float | None = None
    or_null: bool = False

    def check(self, name: str, value: Any) -> None:
        """Raise FieldError for a value of another kind, or out of range."""
        if value is None and self.or_null:
            return
        whole_too = self.kind is float and isinstance(value, int)
        if not (isinstance(value, self.kind) or whole_too) or isinstance(value, bool):
            null = " or null" if self.or_null else ""
            raise FieldError(name, f"{json.dumps(value)} is not {WORDS[self.kind]}{null}")
        if self.kind is not str:
            check_range(name, value, self.least, self.most)


RULES = {
    "family": Rule(str),
    "height": Rule(int, 1, MOST_SIDE),
    "width": Rule(int, 1, MOST_SIDE),
    "guidance": Rule(float, 0, 1e6, or_null=True),
    "max_sequence_length": Rule(int, 1, or_null=True),
    "base_name": Rule(str),
    "base_fingerprint": Rule(str),
    "iteration": Rule(int),
    "ema": Rule(float, 0, 1, or_null=True),
    "recipe": Rule(str, or_null=True),
}


@dataclass(frozen=True)
class StudentCard:
    """How a student was trained, and so how it is to be sampled: `senseflow.json` beside it.

    Raises FieldError, a ValueError, for a value that no student has.
    """

    family: str
    anchors: tuple[float, ...]  # from noisy to clean: sigmas, or SDXL's timesteps as int
    height: int  # pixels trained at
    width: int
    guidance: float | None  # embedded guidance, if the network has it
    max_sequence_length: int | None  # T5 tokens; None: no T5
    base_name: str
    base_fingerprint: str  # of the teacher's weights, see base_fingerprint
    iteration: int
    ema: float | None = None  # decay, when the weights are the student's average
    recipe: str | None = None  # that it was trained by; None: before cards said so

    def __post_init__(self) -> None:
        for name, rule in RULES.items():
            rule.check(name, getattr(self, name))
        if not isinstance(self.anchors, list | tuple):
            raise FieldError("anchors", f"{json.dumps(self.anchors)} is not a list of numbers")
        object.__setattr__(self, "anchors", counted(self.anchors))


def write_card(folder: Path, card: StudentCard) -> None:
    """Write `senseflow.json` to a student's folder."""
    tree = dataclasses.asdict(card)
    base = {"name": tree.pop("base_name"), "fingerprint": tree.pop("base_fingerprint")}
    (folder / CARD).write_text(
        json.dumps({"format": CARD_FORMAT, **tree, "base": base}, indent=2) + "\n"
    )


def read_card(folder: Path) -> StudentCard | None:
    """The card in a student's folder, None without one; raises ValueError when damaged."""
    file = folder / CARD
    if not file.is_file():
        return None
    tree = read_json(file)
    try:
        return _card_of(tree)
    except ValueError as error:
        raise ValueError(f"{file} is not a student's card: {error}") from error


def _card_of(tree: dict[str, Any]) -> StudentCard:
    """A card with every key that it must have and no other; raises ValueError naming the key."""
    number, base = tree.pop("format", None), tree.pop("base", None)
    if number != CARD_FORMAT:
        raise ValueError(f"format {json.dumps(number)}; this version reads format {CARD_FORMAT}")
    if not isinstance(base, dict) or base.keys() != {"name", "fingerprint"}:
        raise ValueError(f"base {json.dumps(base)} does not have a name and a fingerprint alone")
    tree |= {f"base_{key}": value for key, value in base.items()}
    known = {field.name: field for field in dataclasses.fields(StudentCard)}
    needed = {name for name, field in known.items() if field.default is dataclasses.MISSING}
    for keys, what in (
        (needed - tree.keys(), "it has no"),
        (tree.keys() - known.keys(), "unknown"),
    ):
        if keys:
            raise ValueError(f"{what} {', '.join(sorted(keys))}")
    return StudentCard(**tree)
