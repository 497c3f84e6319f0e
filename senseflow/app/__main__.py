"""Open a page in the browser to try a student: prompt, seed, steps and sampler, the student's image
beside its teacher's, and the time of each. Needs gradio: pip install -e ".[app]".

Images are those of scripts_*: the same prompt, seed and settings give the same pixels.
"""

import argparse
import importlib.util
import os
import socket
import sys
from pathlib import Path

from senseflow.common.commands import Parser, exit_status, module_parser, number
from senseflow.common.fields import Port
from senseflow.config.families import family_of
from senseflow.config.recipes import FAMILIES
from senseflow.sampling.cli import add_device_flags, add_student_flags, messages
from senseflow.sampling.drawing import Machine, Paths
from senseflow.teachers.family import Family
from senseflow.weights.card import CARD

EXAMPLES = """examples:
  python -m senseflow.app --pipeline /path/to/teacher --checkpoint runs/flux
  python -m senseflow.app --pipeline exported_student
  python -m senseflow.app --pipeline exported_student --teacher /path/to/teacher --device cuda
"""
HOST, PORT = "127.0.0.1", 7860
STOPPED = "the page is closed"
EXAMPLE = "a red fox in the snow"


def main(arguments: list[str] | None = None) -> int:
    """Parse, check, serve until Ctrl-C; returns the exit status: 2 for wrong input."""
    args = build_parser().parse_args(arguments)
    return exit_status(lambda: run(args), STOPPED)


def build_parser() -> Parser:
    """The flags."""
    parser = module_parser("senseflow.app", __doc__, EXAMPLES)
    group = parser.add_argument_group("what")
    group.add_argument(
        "--pipeline", type=Path, required=True, metavar="DIR",
        help="the teacher's diffusers folder, with --checkpoint; or an exported student pipeline",
    )  # fmt: skip
    configs = sorted({family.config_flag for family in FAMILIES})
    add_student_flags(group, ["--config", *configs], "the checkpoint's own, else the base's")
    group.add_argument(
        "--teacher", type=Path, metavar="DIR",
        help="the teacher's diffusers folder, beside an exported student pipeline",
    )  # fmt: skip
    group.add_argument(
        "--student_only", action="store_true", help="do not read the teacher's network"
    )
    group.add_argument(
        "--prompt", default=EXAMPLE, metavar="TEXT", help="what the page begins with (%(default)s)"
    )
    _add_server_flags(parser)
    add_device_flags(parser)
    return parser


def _add_server_flags(parser: Parser) -> None:
    group = parser.add_argument_group("page")
    group.add_argument(
        "--host", default=HOST, help=f"0.0.0.0: seen by the whole network ({HOST}: by this machine)"
    )
    group.add_argument("--port", type=number(Port), default=PORT, help=f"({PORT})")
    group.add_argument(
        "--share", action="store_true",
        help="also a public address for a week, through gradio's servers: whoever has it can draw",
    )  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Raises ValueError for what cannot be opened, KeyboardInterrupt at the end."""
    check_gradio()
    family, paths, with_teacher = choose_folders(args)
    check_port(args.host, args.port)
    machine = Machine(args.device, args.dtype, args.offload)
    with messages():
        # seconds, and not for --help
        os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
        from senseflow.app.page import serve
        from senseflow.app.studio import open_studio

        studio = open_studio(family, paths, with_teacher, machine)
        serve(studio, args.prompt, args.host, args.port, args.share)


def check_gradio() -> None:
    """Raise ValueError when gradio is not installed."""
    if importlib.util.find_spec("gradio") is None:
        raise ValueError(
            'the page needs gradio, which is not installed: pip install -e ".[app]" in this '
            'repository, or pip install "gradio>=6.31,<7"'
        )


def choose_folders(args: argparse.Namespace) -> tuple[Family, Paths, bool]:
    """Which folder is the base and which the student, and whether the base's network is read as the
    teacher's; raises ValueError for what does not fit.
    """
    family = family_of(args.pipeline, "--pipeline")
    if args.teacher and args.student_only:
        raise ValueError("--teacher and --student_only exclude each other")
    if args.teacher:
        check_teacher(family, args)
    card = args.pipeline / family.component / CARD
    itself = not args.checkpoint or args.checkpoint.resolve() == args.pipeline.resolve()
    if itself:
        if not (card.is_file() or args.checkpoint or args.teacher):
            raise ValueError(
                f"--checkpoint is missing: --pipeline {args.pipeline} is not an exported student "
                f"(there is no {card}); name the student with --checkpoint"
            )
        base, checkpoint, with_teacher = args.teacher or args.pipeline, args.pipeline, args.teacher
    else:
        base, checkpoint, with_teacher = args.pipeline, args.checkpoint, not args.student_only
        if args.teacher:
            raise ValueError(
                "--teacher is for an exported student; with --checkpoint, --pipeline is the teacher"
            )
        if card.is_file() and with_teacher:
            raise ValueError(
                f"--pipeline {args.pipeline} is an exported student: leave out --checkpoint, name "
                "the teacher's folder with --pipeline, or say --student_only"
            )
    return family, Paths(base, checkpoint, args.ema, args.config), bool(with_teacher)


def check_teacher(family: Family, args: argparse.Namespace) -> None:
    """Raise ValueError unless --teacher is a pipeline of the student's family."""
    other = family_of(args.teacher, "--teacher")
    if other.title != family.title:
        raise ValueError(
            f"--teacher {args.teacher} is {other.title}, --pipeline {args.pipeline} is "
            f"{family.title}: a student's teacher is of its own family"
        )


def check_port(host: str, port: int) -> None:
    """Raise ValueError unless a server can listen there."""
    try:
        address, *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ValueError(f"--host {host} cannot be used: {error.strerror}") from error
    with socket.socket(address[0]) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address[4])
        except OSError as error:
            raise ValueError(
                f"--port {port} cannot be used on {host}: {error.strerror}; name another, such as "
                f"--port {port % (2**16 - 1) + 1}"
            ) from error


if __name__ == "__main__":
    sys.exit(main())
