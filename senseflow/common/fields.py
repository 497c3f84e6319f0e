"""Values a user gives, by the names of their fields; a command line says its flags instead."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


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


def leaves(tree: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    """The values in a tree of dictionaries by their dotted keys; an empty dictionary is a value."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            found |= leaves(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def check_range(field: str, value: float | None, least: float, most: float | None = None) -> None:
    """Raise FieldError for a number that was given and is not in [least, most]."""
    # Asked so that NaN, which is neither above nor below anything, is refused.
    if value is not None and not least <= value <= (math.inf if most is None else most):
        allowed = f"at least {least}" if most is None else f"from {least} to {most}"
        raise FieldError(field, f"{value} must be {allowed}")


def check_choice(field: str, value: str | None, choices: tuple[str, ...]) -> None:
    """Raise FieldError for a word that was given and is none of the choices."""
    if value is not None and value not in choices:
        raise FieldError(field, f"{value!r} must be one of {', '.join(choices)}")


def check_finite(field: str, value: float | None) -> None:
    """Raise FieldError for a number that was given and is not finite."""
    if value is not None and not math.isfinite(value):
        raise FieldError(field, f"{value} is not a finite number")
