"""Every command of the documentation is one that its program takes today."""

import re
import shlex

import pytest
from doc_pages import Page, pages, top_folders, tracked
from doc_programs import (
    ELSEWHERE,
    OTHERS,
    Program,
    check_command,
    check_flag,
    check_flags,
    check_make,
    check_paths,
    program_of,
)

COMMAND = re.compile(
    r"(\.venv/bin/)?(python|sh|make|torchrun) \S"
    r"|(scripts|exp)_\w+/\w+\.(py|sh)\b|benchmarks/\w+\.py"
)
EVERYWHERE = [  # the scripts, of which a page may speak without naming one
    Program("script" if name.endswith(".py") else "trainer", name)
    for name in sorted(tracked())
    if re.fullmatch(r"(scripts|exp)_\w+/\w+\.(py|sh)", name)
]
FLAGS_ELSEWHERE = {"--complex"}  # of T2I-CompBench's programs


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_the_programs_take_every_command(page: Page):
    """By their own parsers; overrides by the loader, with the YAML the command names."""
    wrong = []
    for command in page.commands():
        try:
            check_command(command)
        except AssertionError as error:
            wrong.append(f"{command}\n    {error}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_commands_and_flags_within_the_text(page: Page):
    """A flag on its own is one of a program that the page names, or of the scripts."""
    programs, wrong = [*programs_of(page), *EVERYWHERE], []
    for span in page.spans:
        try:
            if COMMAND.match(span):
                check_inline(span)
            elif not span.startswith((*ELSEWHERE, *OTHERS)):
                for word in set(span.split()) - FLAGS_ELSEWHERE:
                    check_flag(word, programs)
        except AssertionError as error:
            wrong.append(f"`{span}`: {error}")
    assert not wrong, "\n".join(wrong)


def programs_of(page: Page) -> list[Program]:
    """Every program of ours that the page names."""
    inline = [span for span in page.spans if COMMAND.match(span) and "*" not in span]
    found = (program_of(shlex.split(command)) for command in [*page.commands(), *inline])
    return sorted({ours[0] for ours in found if ours}, key=str)


def check_inline(span: str) -> None:
    """A command within the text may leave out what its program needs."""
    words = shlex.split(span)
    check_paths(words)
    if words[0] == "make":
        check_make(words[1:])
    elif "*" not in words[0]:
        ours = program_of(words)
        if ours:
            check_flags(*ours)


def test_folders_of_commands_are_looked_at():
    assert {"configs", "scripts_flux", "exp_sd35", "assets", "docs"} <= top_folders()
