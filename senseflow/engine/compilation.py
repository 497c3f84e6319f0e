"""Whether a run compiles its blocks: what its configuration asks, and what the machine has."""

import importlib.util
import logging
import os
import shutil
import sysconfig
from dataclasses import replace
from pathlib import Path

from senseflow.config.sections import ParallelConfig

logger = logging.getLogger(__name__)

C, CXX = ("CC", ("gcc", "clang")), ("CXX", ("g++", "clang++"))


def settle(parallel: ParallelConfig, num_gpus: int) -> ParallelConfig:
    """With `compile` true or false: auto is true where there are GPUs and all that torch.compile
    needs, and says what it lacks.

    Raises ValueError where true cannot be.
    """
    check_compile(parallel, num_gpus)
    if parallel.compile != "auto":
        return parallel
    lacks = what_is_missing(num_gpus) if num_gpus else None
    if lacks:
        logger.info("parallel.compile: auto is off, for torch.compile needs %s", lacks)
    return replace(parallel, compile=num_gpus > 0 and not lacks)


def check_compile(parallel: ParallelConfig, num_gpus: int) -> None:
    """Raise ValueError where `compile` is true and cannot be."""
    if parallel.compile is True and (lacks := what_is_missing(num_gpus)):
        raise ValueError(f"parallel.compile: torch.compile needs {lacks}; say false, or install it")


def what_is_missing(num_gpus: int) -> str | None:
    """What torch.compile's code generator needs and this machine lacks; None: nothing."""
    if num_gpus and importlib.util.find_spec("triton") is None:
        return "triton, which is not installed"
    variable, compilers = C if num_gpus else CXX
    names = os.environ.get(variable, "").split()[:1] or list(compilers)
    if not any(shutil.which(name) for name in names):
        language = "C" if num_gpus else "C++"
        return f"a {language} compiler ({' or '.join(names)}; {variable} names another)"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    return None if header.is_file() else f"Python's headers ({header} is not there)"
