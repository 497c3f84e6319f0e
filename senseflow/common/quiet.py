"""Who may speak: the run's own notes, not the libraries'."""

import logging
import warnings


def set_up_notes(level: int) -> None:
    """The run's own notes alone."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("senseflow").setLevel(level)


def quiet_libraries() -> None:
    """The networks' libraries lose their loading bars and notes."""
    import diffusers  # seconds
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
