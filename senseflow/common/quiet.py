"""Who may speak: the run's own notes, not the libraries'."""

import importlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def set_up_notes(level: int) -> None:
    """The run's own notes alone."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("senseflow").setLevel(level)
    # On CPUs it misses, at import, a kernel that nothing here asks for.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def quiet_libraries() -> None:
    """The networks' libraries lose their loading bars and notes."""
    _silence(_speakers())
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")


@contextmanager
def quiet(*libraries: str) -> Iterator[None]:
    """The same for a while, of both libraries or of those named; the settings before come back."""
    notes = _speakers(*libraries)
    before = [(note.get_verbosity(), note.is_progress_bar_enabled()) for note in notes]
    _silence(notes)
    try:
        yield
    finally:
        for note, (verbosity, shows_bars) in zip(notes, before, strict=True):
            note.set_verbosity(verbosity)
            if shows_bars:
                note.enable_progress_bar()


def _silence(notes: list[Any]) -> None:
    for note in notes:
        note.set_verbosity_error()
        note.disable_progress_bar()


def _speakers(*libraries: str) -> list[Any]:
    names = libraries or ("diffusers", "transformers")  # seconds to import
    return [importlib.import_module(f"{name}.utils.logging") for name in names]
