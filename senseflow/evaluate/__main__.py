"""Measure a student the way the paper's tables do: draw, score, and put in a table.

    python -m senseflow.evaluate generate --base DIR --checkpoint RUN --prompts_file captions.txt \\
        --samplers x0 euler --steps 4 2 1 --output_dir evaluation
    python -m senseflow.evaluate score --help
    python -m senseflow.evaluate table evaluation/results.json --output_dir evaluation

docs/evaluation.md has the whole protocol.
"""

import sys
from types import ModuleType

from senseflow.common.commands import Parser, exit_status
from senseflow.evaluate import cli, score, table
from senseflow.sampling.cli import STOPPED, messages

COMMANDS: dict[str, tuple[ModuleType, str, str]] = {  # module, what it does, what Ctrl-C leaves
    "generate": (cli, "draw the teacher's and a student's images for the prompts", STOPPED),
    "score": (score, "measure a folder of images", "finished metrics are in the results file"),
    "table": (table, "put results and the published ones in one table", "nothing was written"),
}


def main(arguments: list[str] | None = None) -> int:
    """Do one command; returns the exit status: 2 for wrong input, said in one line."""
    args = build_parser().parse_args(arguments)
    module, _, stopped = COMMANDS[args.command]

    def work() -> None:
        with messages():
            module.run(args)

    return exit_status(work, stopped)


def build_parser() -> Parser:
    """The commands, each with the flags of its module."""
    parser = Parser(
        prog="python -m senseflow.evaluate",
        description="Measure a student the way the paper's tables do.",
        epilog="example: %(prog)s generate --base /path/to/base --checkpoint /path/to/run "
        "--prompts_file captions.txt --output_dir evaluation",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, purpose, _) in COMMANDS.items():
        module.add_arguments(commands.add_parser(name, help=purpose, description=f"{purpose}."))
    return parser


if __name__ == "__main__":
    sys.exit(main())
