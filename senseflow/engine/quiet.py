"""The libraries of the networks, without their loading bars and notes."""

import warnings

import diffusers
import transformers


def quiet_libraries() -> None:
    """Without their loading bars and notes."""
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
