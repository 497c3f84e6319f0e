"""Who may speak: the run's own notes, not the libraries'."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def set_up_notes(level: int) -> None:
    """The run's own notes alone."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("senseflow").setLevel(level)


def quiet_libraries() -> None:
    """The networks' libraries lose their loading bars and notes."""
    _silence()
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")


@contextmanager
def quiet() -> Iterator[None]:
    """The same for a while: a caller's own settings come back."""
    notes = _speakers()
    before = [(note.get_verbosity(), note.is_progress_bar_enabled()) for note in notes]
    _silence()
    try:
        yield
    finally:
        for note, (verbosity, shows_bars) in zip(notes, before, strict=True):
            note.set_verbosity(verbosity)
            if shows_bars:
                note.enable_progress_bar()


def _silence() -> None:
    for note in _speakers():
        note.set_verbosity_error()
        note.disable_progress_bar()


def _speakers() -> list[Any]:
    import diffusers  # seconds
    import transformers

    return [diffusers.utils.logging, transformers.utils.logging]
