"""The exit status of a command that is called in this process."""

from collections.abc import Callable


def status_of(main: Callable[[list[str]], int], words: list[str]) -> object:
    """What the shell would see: argparse ends with SystemExit, what comes after returns."""
    try:
        return main(words)
    except SystemExit as end:
        return end.code
