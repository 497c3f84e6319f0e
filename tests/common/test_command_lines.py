"""What all command lines share: how numbers and paths are read, and how errors are said."""

import argparse
import errno
import re
from pathlib import Path

import pytest
from doc_pages import ROOT, tracked
from doc_programs import Program, actions_of, parser_of
from statuses import status_of

from senseflow.cache import __main__ as cache
from senseflow.common.commands import Number, Parser, exit_status, number
from senseflow.common.fields import Port, Seed
from senseflow.config.recipes import RECIPES
from senseflow.data.check import __main__ as check
from senseflow.data.make import __main__ as make
from senseflow.evaluate import __main__ as evaluate
from senseflow.sampling.drawing import Paths
from senseflow.tiny import compare

ZERO_IS_MEANT = {
    "--seed", "--teacher_seed",  # a seed like any other
    "--start_idx",  # the first prompt
    "--max_unreadable", "--max_left_out", "--max_damaged",  # none may be
    "--max-restarts",  # none
    "--guidance", "--teacher_guidance",  # without the prompt
    "--sigmas", "--timesteps",  # no noise, which then is no anchor
    "--eta",  # of cps: euler
    "--memory", "--reserve",  # of a plan: nothing fits; nothing is kept back
    "--fid_resize", "--clip_resize", "--dinov2_size", "--lpips_size",  # left at their size
}  # fmt: skip


SOURCES = [name for name in sorted(tracked()) if re.fullmatch(r"(?!tests/).*\.py", name)]


def programs() -> list[Program]:
    """The commands, scripts and trainers."""
    found = [Program("trainer", recipe.script) for recipe in RECIPES.values()]
    for name in SOURCES:
        if re.fullmatch(r"scripts_\w+/.*", name):
            found.append(Program("script", name))
        elif (
            re.match(r"senseflow/(?!trainer)", name) and "__name__ ==" in (ROOT / name).read_text()
        ):
            module = name.removesuffix(".py").removesuffix("/__main__").replace("/", ".")
            found.append(Program("module", module))
    return found


PROGRAMS = programs()


def refusal(read: Number, text: str) -> str | None:
    try:
        read(text)
    except argparse.ArgumentTypeError as error:
        return str(error)
    return None


@pytest.mark.parametrize("program", PROGRAMS, ids=str)
def test_every_number_on_a_command_line_has_bounds(program):
    for action in actions_of(parser_of(program)):
        name = action.option_strings[0] if action.option_strings else action.dest
        if not isinstance(action.type, Number):
            continue
        for text in ("-1", "nan", "inf", "-inf", "1e30", "9" * 30, "four", "", "1,5"):
            said = refusal(action.type, text)
            assert said and len(said) < 250, f"{name} {text}"
        assert (refusal(action.type, "0") is None) == (name in ZERO_IS_MEANT), name
        several = isinstance(action.default, list)  # of a flag that takes several numbers
        defaults = action.default if several else [action.default]
        assert all(value is None or value in action.type.bounds for value in defaults)


def test_no_number_is_read_in_another_way():
    assert len(PROGRAMS) > 20
    for name in SOURCES:  # benchmarks and examples too
        assert not re.search(r"\btype=(int|float)\b", (ROOT / name).read_text()), name


def parser() -> Parser:
    one = Parser(prog="x")
    one.add_argument("--port", type=number(Port))
    one.add_argument("--seed", type=number(Seed))
    one.add_argument("--output", type=Path)
    return one


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--port", "0"], "argument --port: 0 must be from 1 to 65535"),
        (["--port", "65536"], "argument --port: 65536 must be from 1 to 65535"),
        (["--port", "8080.0"], "argument --port: '8080.0' is not a whole number"),
        (["--seed", "-1"], "argument --seed: -1 must be from 0 to 9223372036854775807"),
        (["--output", ""], "argument --output: '' is empty"),
        (["--output", "a" * 256], "is too long for a path: a name has at most 255 bytes"),
        (["--output", "a/" * 2100], "is too long for a path"),
    ],
)
def test_an_argument_that_cannot_be_is_named_in_a_line(capsys, words, said):
    with pytest.raises(SystemExit) as stopped:
        parser().parse_args(words)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and said in error
    assert error.count("\n") == 1 and len(error) < 250


LONG = "x" * 300


@pytest.mark.parametrize(
    ("program", "words", "flag"),
    [
        (check.main, ["a.json", LONG], "CONFIG"),
        (cache.main, [LONG, "--output", "a"], "CONFIG"),
        (make.main, [LONG, "--output", "b.json"], "SOURCE"),
        (evaluate.main, ["table", "--geneval", "a", LONG, "--output_dir", "t"], "--geneval"),
        (
            evaluate.main,
            ["score", "--name", "a", "--images", ".", "--metrics", "diversity_dinov2", "--dinov2",
             f"local-dir:{LONG}"],
            "--dinov2",
        ),
        (compare.main, ["--pair", "a", LONG, "b", "--common", "assets/tiny/common",
                        "--output", "none"], "--pair"),
    ],
)  # fmt: skip
def test_a_path_that_is_no_argument_of_its_own_is_named_by_its_flag(
    program, words, flag, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.json").write_text("{}")
    assert status_of(program, words) == 2
    error = capsys.readouterr().err
    assert f"{flag} '" in error and "is too long for a path" in error and len(error) < 250


@pytest.mark.parametrize("field", ["base", "checkpoint", "config", "lora"])
def test_a_path_from_python_is_named_by_its_field(field, tmp_path):
    given = {"base": tmp_path, "checkpoint": tmp_path, field: Path(LONG)}
    with pytest.raises(ValueError, match=f"^{field} 'xxx.*is too long for a path") as said:
        Paths(**given)
    assert len(str(said.value)) < 250


def test_a_path_that_grew_too_long_is_said_without_a_number(capsys):
    def work() -> None:
        raise OSError(errno.ENAMETOOLONG, "File name too long", "b" * 5000)

    assert exit_status(work, "") == 2
    error = capsys.readouterr().err
    assert "is too long for a path" in error and "Errno" not in error and len(error) < 250
