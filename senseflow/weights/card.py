"""A student's card, `senseflow.json` beside its weights: how it was trained, how it is sampled."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, cast, get_args, get_origin, get_type_hints

from senseflow.common.fields import (
    Count,
    CountOrNone,
    FieldError,
    Guidance,
    Pixels,
    Share,
    check,
    short,
)
from senseflow.common.files import read_json
from senseflow.core.levels import counted
from senseflow.core.names import BaseForm

CARD = "senseflow.json"  # beside a student's weights: how it was trained
CARD_FORMAT = 1
WORDS = {str: "a text", int: "a whole number", float: "a number", tuple: "a list"}


@dataclass(frozen=True)
class StudentCard:
    """How a student was trained, and so how it is to be sampled: `senseflow.json` beside it.

    Raises FieldError, a ValueError, for a value that no student has.
    """

    family: str
    anchors: tuple[float, ...]  # from noisy to clean: sigmas, or SDXL's timesteps as int
    height: Pixels  # trained at
    width: Pixels
    guidance: Guidance | None  # embedded guidance, if the network has it
    max_sequence_length: Count | None  # tokens of a prompt; None: a fixed number
    base_name: str
    base_fingerprint: str  # of the teacher's weights, see base_fingerprint
    iteration: CountOrNone
    ema: Share | None = None  # decay, when the weights are the student's average
    recipe: str | None = None  # that it was trained by; None: before cards said so
    base_form: str | None = None  # int8 or nf4: of the base a LoRA was trained on; None: whole
    eta: Share | None = None  # of the cps sampler that rewards have trained; None: that is x0

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(StudentCard, include_extras=True).items():
            _check_declared(name, getattr(self, name), hint)
        if self.base_form not in (None, "int8", "nf4"):
            raise FieldError("base_form", f"{short(self.base_form)} is neither int8 nor nf4")
        object.__setattr__(self, "anchors", counted(self.anchors))


def _check_declared(name: str, value: Any, hint: Any) -> None:
    """Raise FieldError for what is not of a field's declared type, or out of its bounds."""
    or_null = NoneType in get_args(hint)
    if value is None and or_null:
        return
    declared = get_args(hint)[0] if or_null else hint
    kind, *rules = get_args(declared) if get_origin(declared) is Annotated else [declared]
    kind = get_origin(kind) or kind
    kinds = {float: (int, float), tuple: (list, tuple)}.get(kind, (kind,))
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise FieldError(name, f"{short(value)} is not {WORDS[kind]}{' or null' * or_null}")
    for rule in rules:
        check(name, value, rule)


def base_form(card: StudentCard | None) -> BaseForm:
    """The form of the base that a student's adapters were trained on."""
    return cast(BaseForm, card.base_form) if card and card.base_form else "bfloat16"


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
        raise ValueError(f"format {short(number)}; this version reads format {CARD_FORMAT}")
    if not isinstance(base, dict) or base.keys() != {"name", "fingerprint"}:
        raise ValueError(f"base {short(base)} does not have a name and a fingerprint alone")
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
