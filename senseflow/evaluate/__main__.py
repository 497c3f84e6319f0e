"""Measure a student the way the paper's tables do: draw, score, and put in a table.

    python -m senseflow.evaluate generate --base DIR --checkpoint RUN --prompts_file captions.txt \\
        --samplers x0 euler --steps 4 2 1 --output_dir evaluation
    python -m senseflow.evaluate score --help
    python -m senseflow.evaluate table evaluation/results.json --output_dir evaluation

docs/evaluation.md has the whole protocol.
"""

import sys
from argparse import Namespace
from collections.abc import Callable
from typing import NamedTuple

from senseflow.common.commands import Parser, exit_status
from senseflow.evaluate import cli, score, table
from senseflow.sampling.cli import STOPPED, messages


class Command(NamedTuple):
    """One of the three commands: its flags, and what it does with them."""

    purpose: str
    left: str  # by Ctrl-C
    add_flags: Callable[[Parser], None]
    run: Callable[[Namespace], None]


DRAW = "draw the teacher's and a student's images for the prompts"
MEASURED = "finished metrics are in the results file"
JOIN = "put results and the published ones in one table"
COMMANDS = {
    "generate": Command(DRAW, STOPPED, cli.add_arguments, cli.run_generate),
    "score": Command("measure a folder of images", MEASURED, score.add_arguments, cli.run_score),
    "table": Command(JOIN, "nothing was written", table.add_arguments, cli.run_table),
}


def main(arguments: list[str] | None = None) -> int:
    """Do one command; returns the exit status: 2 for wrong input, said in one line."""
    args = build_parser().parse_args(arguments)
    command = COMMANDS[args.command]

    def work() -> None:
        with messages():
            command.run(args)

    return exit_status(work, command.left)


def build_parser() -> Parser:
    """The commands, each with the flags of its module."""
    parser = Parser(
        prog="python -m senseflow.evaluate",
        description="Measure a student the way the paper's tables do.",
        epilog="example: %(prog)s generate --base /path/to/base --checkpoint /path/to/run "
        "--prompts_file captions.txt --output_dir evaluation",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, one in COMMANDS.items():
        one.add_flags(commands.add_parser(name, help=one.purpose, description=f"{one.purpose}."))
    return parser


if __name__ == "__main__":
    sys.exit(main())
