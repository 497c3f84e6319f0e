"""What the command lines share."""

import argparse
import errno
import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, get_args

from senseflow.common.fields import Bounds, FieldError, PathText, short

logger = logging.getLogger("senseflow")


@dataclass(frozen=True)
class Number:
    """How argparse reads the text of a flag: as a number within bounds."""

    base: type[int] | type[float]
    bounds: Bounds
    hint: str = ""  # said after what is no number

    def __call__(self, text: str) -> float:
        """The number in a text; raises ArgumentTypeError, to which argparse adds the flag."""
        try:
            value = self.base(text)
        except ValueError:
            what = "a whole number" if self.base is int else "a number"
            raise argparse.ArgumentTypeError(f"{short(text)} is not {what}{self.hint}") from None
        if refusal := self.bounds.refusal(value):
            raise argparse.ArgumentTypeError(f"{short(value)} {refusal}")
        return value


def number(kind: Any, hint: str = "") -> Number:
    """How a flag of a kind of number is read, such as `senseflow.common.fields.Seed`."""
    base, bounds = get_args(kind)
    return Number(base, bounds, hint)


def read_path(text: str) -> Path:
    """How argparse reads a path; raises ArgumentTypeError for what no file can be called."""
    if refusal := PathText().refusal(text):
        raise argparse.ArgumentTypeError(f"{short(text)} {refusal}")
    return Path(text)


def path_given(flag: str, text: str) -> Path:
    """The path in a part of an argument; raises ValueError, with the flag, as `read_path` does."""
    try:
        return read_path(text)
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"{flag} {error}") from None


class Parser(argparse.ArgumentParser):
    """An argument parser that says an error in one line, without the usage; `type=Path` reads what
    can be one.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register("type", Path, read_path)

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


def add_config(parser: argparse.ArgumentParser, what: str) -> None:
    """CONFIG, with its overrides after it or by the flag --config; `take_config` reads them.

    what: the configuration is, for the help.
    """
    parser.add_argument(
        "overrides", nargs="*", metavar="CONFIG key.sub=value", help=f"{what}; and its overrides"
    )
    parser.add_argument("--config", type=Path, metavar="CONFIG", help="the same by its name")


def take_config(args: argparse.Namespace, required: bool = True) -> None:
    """Put the CONFIG among the words where the flag --config would; raises ValueError for a file
    that is not there, for two, and where it is required for none."""
    named = [word for word in args.overrides if "=" not in word]
    args.overrides = [word for word in args.overrides if "=" in word]
    if args.config is not None:
        named.append(str(args.config))
    if len(named) > 1:
        raise ValueError(f"{named[0]} and {named[1]}: one CONFIG, and overrides as key.sub=value")
    if required and not named:
        raise ValueError("CONFIG is missing: the YAML file of a recipe")
    args.config = path_given("CONFIG", named[0]) if named else None
    if args.config and not args.config.is_file():
        raise ValueError(f"config file not found: {args.config}")


def exit_status(work: Callable[[], int | None], stopped: str) -> int:
    """Do the work of a command; what it returns (None: 0), or, said in one line, 2 for wrong input
    and 130 for Ctrl-C.

    stopped: what is left after Ctrl-C.
    """
    try:
        with ctrl_c_heard():
            return work() or 0
    except (ValueError, OSError) as error:
        logger.debug("", exc_info=error)
        sys.stderr.write(f"error: {words_of(error)}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write(f"stopped: {stopped}\n")
        return 130


@contextmanager
def ctrl_c_heard() -> Iterator[None]:
    """While Ctrl-C is a KeyboardInterrupt, where before and after it ends the process: see
    `senseflow.end_on_ctrl_c`."""
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def words_of(error: Exception) -> str:
    """An error in one line; of a full disk also what to do, as the system's words name no place."""
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return f"{short(str(error.filename))} {PathText.TOO_LONG}"
    said = error.as_flag if isinstance(error, FieldError) else str(error)
    words = " ".join(said.split())
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        words += ". Free some of the disk that is written to, then run the same command again"
    return words
