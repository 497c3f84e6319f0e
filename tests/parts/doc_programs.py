"""Commands as a user types them, read by the programs' own argument parsers; nothing is run."""

import argparse
import contextlib
import importlib.util
import io
import re
import runpy
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from unittest import mock

from doc_pages import ROOT, top_folders, tracked
from torch.distributed.run import get_args_parser

from senseflow.config.config import load_config
from senseflow.config.load import load_recipe
from senseflow.config.recipes import RECIPES, Recipe
from senseflow.launch.entry import read_arguments

OTHERS = (
    "conda",
    "source",
    "pip",
    "curl",
    "cd",
    "git",
    "sbatch",
    "hf",
    "ssh",
    "python",
    "python3.11",
)
"""Programs that are not ours: only the files of the repository they are given are looked at."""
ELSEWHERE = (
    "evaluation/evaluate_images.py",
    "BLIPvqa_eval/",
    "UniDet_eval/",
    "CLIPScore_eval/",
    "3_in_1_eval/",
)
"""Programs of GenEval and T2I-CompBench, in folders of their own."""


@dataclass(frozen=True)
class Program:
    """One of our programs: a module, a script, or a trainer behind its shell script."""

    kind: str
    name: str

    def __str__(self) -> str:
        return {"module": "python -m ", "script": "python ", "trainer": "sh "}[
            self.kind
        ] + self.name


class Stopped(BaseException):
    """Ends a program where it has read its command line."""

    def __init__(self, parser: argparse.ArgumentParser, args: argparse.Namespace | None) -> None:
        self.parser, self.namespace = parser, args


def program_of(words: list[str]) -> tuple[Program, list[str]] | None:
    """The program of ours that a command runs, and its arguments; None for other programs.

    Raises AssertionError for a module, script or shell script that does not exist.
    """
    words = list(words)
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words.pop(0)
    words[0] = words[0].removeprefix(".venv/bin/")
    if words[:1] == ["torchrun"]:
        args = get_args_parser().parse_args(words[1:])
        rest = [args.training_script, *args.training_script_args]
        words = ["python", *(["-m"] if args.module else []), *rest]
    if words[0].startswith(("scripts_", "exp_", "benchmarks/", "examples/")):
        words.insert(0, "sh" if words[0].endswith(".sh") else "python")
    if words[0] == "sh":
        assert words[1] in tracked(), f"there is no {words[1]}"
        return Program("trainer", words[1]), words[2:]
    if words[0] != "python" or words[1].startswith(("-c", *ELSEWHERE)):
        return None
    if words[1] == "-m":
        if words[2] in ("pytest", "pip", "venv"):
            return None
        assert is_module(words[2]), f"there is no module {words[2]}"
        return Program("module", words[2]), words[3:]
    assert words[1] in tracked(), f"there is no {words[1]}"
    return Program("script", words[1]), words[2:]


def is_module(name: str) -> bool:
    """Whether `python -m NAME` finds a file of this repository."""
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        return False
    return spec is not None and bool(spec.origin) and Path(spec.origin).is_relative_to(ROOT)


def parse(program: Program, words: list[str]) -> argparse.Namespace:
    """What the program makes of its command line; raises AssertionError with its own message."""

    def reading(original: Callable[..., argparse.Namespace]) -> Callable[..., None]:
        def read(self: argparse.ArgumentParser, *args: object) -> None:
            raise Stopped(self, original(self, *args))

        return read

    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            stopped = _run(program, words, reading)
    except SystemExit:
        raise AssertionError(f"{program}: {stderr.getvalue().strip()}") from None
    assert stopped.namespace is not None
    return stopped.namespace


@cache
def parser_of(program: Program) -> argparse.ArgumentParser:
    """What reads a program's command line."""

    def stopping(original: Callable[..., argparse.Namespace]) -> Callable[..., None]:
        def read(self: argparse.ArgumentParser, *args: object) -> None:
            raise Stopped(self, None)

        return read

    return _run(program, [], stopping).parser


def actions_of(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Its arguments and those of its subcommands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                yield from actions_of(sub)


@cache
def options(program: Program) -> frozenset[str]:
    """Every flag of a program and of its subcommands."""
    actions = actions_of(parser_of(program))
    return frozenset(flag for action in actions for flag in action.option_strings)


def _run(program: Program, words: list[str], wrap: Callable[..., Callable[..., None]]) -> Stopped:
    """The program up to where it reads its arguments, with that call replaced."""
    names = ("parse_args", "parse_intermixed_args")
    base = argparse.ArgumentParser
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch.object(base, name, wrap(getattr(base, name))))
        stack.enter_context(mock.patch.object(sys, "argv", [program.name, *words]))
        try:
            start(program)
        except Stopped as stopped:
            return stopped
    raise AssertionError(f"{program} reads no command line")


def start(program: Program) -> None:
    """The program as `python` starts it, with the command line in sys.argv."""
    if program.kind == "trainer":
        read_arguments(recipe_of(program.name))
    elif program.kind == "module":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # imported before, by another program
            runpy.run_module(program.name, run_name="__main__", alter_sys=False)
    else:
        script = ROOT / program.name
        with (
            mock.patch.object(sys, "path", [str(script.parent), *sys.path]),
            mock.patch("senseflow.end_on_ctrl_c"),  # which is of a process of its own
        ):
            runpy.run_path(str(script), run_name="__main__")


def recipe_of(script: str) -> Recipe:
    """What a training script runs."""
    return next(recipe for recipe in RECIPES.values() if recipe.script == script)


def is_template(words: list[str]) -> bool:
    """Whether words stand for others: NODES, [--flag N], ..."""
    return any(
        word == "..." or word.startswith("[") or re.fullmatch(r"[A-Z][A-Z_]*", word)
        for word in words
    )


def check_command(command: str) -> Program | None:
    """Raise AssertionError for what is not there any more; returns the program if it is ours."""
    words = shlex.split(command)
    check_paths(words)
    if words[0] == "make":
        check_make(words[1:])
        return None
    found = program_of(words)
    if found is None:
        name = words[0].removeprefix(".venv/bin/")
        assert name in OTHERS, f"{name} is no program the test knows: {command}"
        return None
    program, rest = found
    if is_template(rest):
        check_flags(program, rest)
    else:
        check_overrides(program, parse(program, rest))
    return program


def check_flags(program: Program, words: list[str]) -> None:
    """Raise AssertionError for a word that looks like a flag and is none of the program's."""
    for word in words:
        check_flag(word.strip("[]"), [program])


def check_flag(word: str, programs: list[Program]) -> None:
    """Raise AssertionError for a flag that none of the programs has."""
    flag = word.split("=")[0]
    if re.fullmatch(r"--?[a-zA-Z][\w.-]*", flag):
        assert any(flag in options(program) for program in programs), (
            f"{flag} is no flag of {', '.join(map(str, programs)) or 'any program of this page'}"
        )


def check_overrides(program: Program, args: argparse.Namespace) -> None:
    """Load the configuration a command names, with its overrides."""
    given = vars(args)
    if "overrides" not in given or given.get("config") is None:
        return
    file = ROOT / given["config"]
    assert file.is_file(), f"there is no {given['config']}"
    try:
        if program.kind == "trainer":
            load_recipe(recipe_of(program.name), file, given["overrides"])
        else:
            load_config(file, given["overrides"])
    except ValueError as error:
        raise AssertionError(str(error)) from None


def check_paths(words: list[str]) -> None:
    """Raise AssertionError for a file in a folder of the repository that is not there."""
    for word in words:
        path = word.split("=")[-1].removeprefix("./").rstrip("/")
        if "/" in path and path.split("/")[0] in top_folders():
            assert is_path(path), f"there is no {path}"


def is_path(path: str) -> bool:
    """Whether a path from the root, perhaps with wildcards, is a file or folder there."""
    pattern = re.compile(re.escape(path).replace(r"\*", "[^/]*") + r"(/.*)?")
    return any(pattern.fullmatch(name) for name in tracked())


def check_make(words: list[str]) -> None:
    """Raise AssertionError for a target or a variable that the Makefile does not have."""
    makefile = (ROOT / "Makefile").read_text()
    for word in words:
        name, is_variable, _ = word.partition("=")
        pattern = rf"^{re.escape(name)} *(\?=|:=|=)" if is_variable else rf"^{re.escape(name)}:"
        kind = "variable" if is_variable else "target"
        assert re.search(pattern, makefile, re.MULTILINE), f"the Makefile has no {kind} {name}"
