"""Values a user gives, by the names of their fields; a command line says its flags instead.

What a field takes is declared once, beside its type: `Annotated[float, Bounds(0, 1)]`. The reader
of configurations, the command lines and docs/configuration.md all read it there.
"""

import math
import reprlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral, Real
from operator import gt, le, lt
from typing import Annotated, Any, ClassVar, Literal

NAME_BYTES, PATH_BYTES = 255, 4095  # of a file's name and of a path, on Linux


class FieldError(ValueError):
    """A value that cannot be used: `field` is its name, `reason` goes on from there."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field} {reason}")
        self.field = field
        self.reason = reason

    @property
    def as_flag(self) -> str:
        """What a command line says of it."""
        return f"--{self.field} {self.reason}"


@contextmanager
def flag_names(**flags: str) -> Iterator[None]:
    """For fields that a command line's flags are not called after: `flags` by field."""
    try:
        yield
    except FieldError as error:
        if error.field not in flags:
            raise
        raise ValueError(f"{flags[error.field]} {error.reason}") from error


@dataclass(frozen=True)
class Bounds:
    """The finite numbers from `least` to `most`; `above` and `below` leave out the ends."""

    least: float
    most: float = math.inf
    above: bool = False
    below: bool = False

    def __contains__(self, value: float) -> bool:
        # Asked so that NaN, which is neither above nor below anything, is refused.
        high_enough = value > self.least if self.above else value >= self.least
        low_enough = value < self.most if self.below else value <= self.most
        return high_enough and low_enough and value != math.inf

    def __str__(self) -> str:
        """Such as "from 0 to 1", "above 0 and at most 1" or "at least 0"."""
        least, most = plain(self.least), plain(self.most)
        if self.most == math.inf:
            return f"{'above' if self.above else 'at least'} {least}"
        if not (self.above or self.below):
            return f"from {least} to {most}"
        low = f"{'above' if self.above else 'at least'} {least}"
        return f"{low} and {'below' if self.below else 'at most'} {most}"

    def refusal(self, value: float) -> str | None:
        """What is wrong with a number; None: nothing."""
        return None if value in self else f"must be {self}"


ORDERS = {
    "[low, high]": le,
    "[low, high], not equal": lt,
    "rising": lt,
    "not falling": le,
    "falling": gt,
}


@dataclass(frozen=True)
class Order:
    """How the numbers of a list follow each other; there must be one at least."""

    name: Literal["[low, high]", "[low, high], not equal", "rising", "not falling", "falling"]

    def __str__(self) -> str:
        """Its name."""
        return self.name

    def refusal(self, values: Sequence[float]) -> str | None:
        """What is wrong with a list; None: nothing."""
        if not values:
            return "is empty: name at least one number"
        fits = all(ORDERS[self.name](before, after) for before, after in pairwise(values))
        return None if fits else f"must be {self}"


@dataclass(frozen=True)
class PathText:
    """Text that can be a path: neither empty nor longer than a file system's names."""

    TOO_LONG: ClassVar[str] = (
        f"is too long for a path: a name has at most {NAME_BYTES} bytes, the whole {PATH_BYTES}"
    )

    def refusal(self, text: str) -> str | None:
        """What is wrong with a path; None: nothing."""
        if not text.strip():
            return "is empty"
        if "\0" in text:
            return "has a character of code 0: no path has one"
        longest = max(len(name.encode(errors="replace")) for name in text.split("/"))
        if longest > NAME_BYTES or len(text.encode(errors="replace")) > PATH_BYTES:
            return self.TOO_LONG
        return None


Rule = Bounds | Order | PathText

# Sane rather than possible: what is beyond was not meant, and would hang or fill the memory.
MOST = 10**9  # of what is counted: at ten a second, three years
Count = Annotated[int, Bounds(1, MOST)]
CountOrNone = Annotated[int, Bounds(0, MOST)]
SmallCount = Annotated[int, Bounds(1, 2**16)]  # of what is held at a time: samples, processes
Workers = Annotated[int, Bounds(0, 256)]  # processes or threads beside this one
Pixels = Annotated[int, Bounds(1, 2**16 - 1)]  # of a side
PixelsOrNone = Annotated[int, Bounds(0, 2**16 - 1)]
Seed = Annotated[int, Bounds(0, 2**63 - 1)]  # of torch's generators
Threads = Annotated[int, Bounds(1, 256)]  # or processes, of one machine
Fraction = Annotated[float, Bounds(0, 1, above=True)]
Guidance = Annotated[float, Bounds(0, 100)]  # published teachers are guided at 1 to 15
Share = Annotated[float, Bounds(0, 1)]
Port = Annotated[int, Bounds(1, 2**16 - 1)]
PathName = Annotated[str, PathText()]


def check(field: str, value: Any, rule: Rule) -> None:
    """Raise FieldError for a value that was given and does not keep to the rule."""
    if value is not None and (refusal := rule.refusal(value)):
        raise FieldError(field, f"{short(value)} {refusal}")


def check_range(field: str, value: float | None, least: float, most: float | None = None) -> None:
    """Raise FieldError for a number that was given and is not in [least, most]."""
    check(field, value, Bounds(least, math.inf if most is None else most))


def check_whole(field: str, value: int | None, least: int, most: int | None = None) -> None:
    """Raise FieldError for what was given and is no whole number in [least, most]."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, Integral)):
        raise FieldError(field, f"{value!r} is not a whole number")
    check_range(field, value, least, most)


def check_flag(field: str, value: bool) -> None:
    """Raise FieldError for what is neither True nor False; "no" would count as True."""
    if not isinstance(value, bool):
        raise FieldError(field, f"{value!r} is neither True nor False")


def check_choice(field: str, value: str | None, choices: tuple[str, ...]) -> None:
    """Raise FieldError for a word that was given and is none of the choices."""
    if value is not None and value not in choices:
        raise FieldError(field, f"{value!r} must be one of {', '.join(choices)}")


def check_finite(field: str, value: float | None) -> None:
    """Raise FieldError for what was given and is no finite number."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, Real)):
        raise FieldError(field, f"{value!r} is not a number")
    if value is not None and not math.isfinite(value):
        raise FieldError(field, f"{value} is not a finite number")


def leaves(tree: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    """The values in a tree of dictionaries by their dotted keys; an empty dictionary is a value."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            found |= leaves(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def plain(number: float) -> str:
    """A number as one writes it: 1e9, 0.5, 65535."""
    text = f"{number:g}".replace("e+0", "e").replace("e-0", "e-").replace("e+", "e")
    return text if float(text) == number else str(number)


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxdict = 2, 8, 4
_SHORT.maxstring = _SHORT.maxother = 60
_SHORT.maxlong = 40


def short(value: Any) -> str:
    """A value in a message, in YAML's words; of a long one its beginning and end."""
    for word, meant in (("null", None), ("true", True), ("false", False)):
        if value is meant:
            return word
    try:
        return _SHORT.repr(list(value) if isinstance(value, tuple) else value)
    except ValueError:  # an int of more digits than Python prints
        return f"a number of {value.bit_length()} bits"
