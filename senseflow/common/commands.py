"""What the command lines share."""

import argparse
import errno
import logging
import sys
from collections.abc import Callable
from typing import NoReturn

from senseflow.common.fields import FieldError

logger = logging.getLogger("senseflow")


class Parser(argparse.ArgumentParser):
    """An argument parser that says an error in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """One line, the mistake alone; exit status 2."""
        self.exit(2, f"error: {message}\n")


def module_parser(module: str, description: str | None, epilog: str) -> Parser:
    """The parser of `python -m MODULE`; description and epilog keep their own lines.

    description: the docstring of the module, None where Python leaves them out.
    """
    return Parser(
        prog=f"python -m {module}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def exit_status(work: Callable[[], int | None], stopped: str) -> int:
    """Do the work of a command; what it returns (None: 0), or, said in one line, 2 for wrong input
    and 130 for Ctrl-C.

    stopped: what is left after Ctrl-C.
    """
    try:
        return work() or 0
    except (ValueError, OSError) as error:
        logger.debug("", exc_info=error)
        sys.stderr.write(f"error: {_words(error)}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write(f"stopped: {stopped}\n")
        return 130


def _words(error: Exception) -> str:
    """An error in one line; of a full disk also what to do, as the system's words name no place."""
    said = error.as_flag if isinstance(error, FieldError) else str(error)
    words = " ".join(said.split())
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        words += ". Free some of the disk that is written to, then run the same command again"
    return words
