"""The pages of the documentation, taken apart: code blocks, code spans, links, headings."""

import re
import subprocess
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"(?:^\n|\A)((?:^ {4}.*\n(?:\n(?= {4}))?)+)", re.MULTILINE)
_SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")
_LINK = re.compile(r"(!?)\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ +(.+?)\s*$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A block of code: its language ("" where none is said) and its dedented text."""

    language: str
    text: str


@dataclass(frozen=True)
class Page:
    """One Markdown file."""

    file: Path

    @property
    def name(self) -> str:
        return str(self.file.relative_to(ROOT))

    @cached_property
    def text(self) -> str:
        return self.file.read_text(encoding="utf-8")

    @cached_property
    def prose(self) -> str:
        """The text without its blocks of code."""
        return _INDENTED.sub("\n", _FENCE.sub("", self.text))

    @cached_property
    def blocks(self) -> list[Block]:
        """Fenced blocks, and indented ones outside of lists."""
        fenced = [Block(m[2], textwrap.dedent(m[3])) for m in _FENCE.finditer(self.text)]
        rest = _FENCE.sub("", self.text)
        indented = [Block("", textwrap.dedent(m[1])) for m in _INDENTED.finditer(rest)]
        return fenced + indented

    @cached_property
    def spans(self) -> list[str]:
        """The code spans, each on one line."""
        return [" ".join(span.split()) for span in _SPAN.findall(self.prose)]

    @cached_property
    def links(self) -> list[tuple[bool, str]]:
        """(is it a picture, target) of every link."""
        return [(bool(m[1]), m[2]) for m in _LINK.finditer(self.prose)]

    @cached_property
    def anchors(self) -> set[str]:
        """What GitHub makes of the headings: lower case, punctuation dropped, blanks to hyphens."""
        found: set[str] = set()
        for heading in _HEADING.findall(_FENCE.sub("", self.text)):
            plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
            slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
            same = sum(1 for a in found if re.fullmatch(re.escape(slug) + r"(-\d+)?", a))
            found.add(f"{slug}-{same}" if same else slug)
        return found

    def commands(self) -> Iterator[str]:
        """The shell commands of its blocks, a command on one line each."""
        for block in self.blocks:
            if block.language in ("bash", "sh") or (not block.language and is_shell(block.text)):
                yield from shell_commands(block.text)


def is_shell(text: str) -> bool:
    """Whether an indented block is of commands rather than of formulas."""
    return text.startswith(("python ", "sh ", "make ", "torchrun ", "hf ", "pip ", "git "))


def shell_commands(text: str) -> Iterator[str]:
    """Simple commands, without comments, the words of loops, and line ends in between."""
    for line in text.replace("\\\n", " ").splitlines():
        command = re.sub(r"(^|\s)#.*$", "", line).strip()
        if command and not re.match(r"(for|done|do)\b", command):
            yield " ".join(command.split())


@cache
def tracked() -> frozenset[str]:
    """Every file of the repository, new ones too, by its path from the root.

    Where there is no git repository (an unpacked archive), every file but what commands leave.
    """
    if not (ROOT / ".git").exists():
        files = (file.relative_to(ROOT) for file in ROOT.rglob("*") if file.is_file())
        left = {".venv", "runs", "outputs", "build", "__pycache__"}
        return frozenset(str(file) for file in files if not left & set(file.parts))
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return frozenset(line for line in listed.splitlines() if (ROOT / line).exists())


@cache
def top_folders() -> frozenset[str]:
    """The folders at the root of the repository."""
    return frozenset(name.split("/")[0] for name in tracked() if "/" in name)


@cache
def pages() -> tuple[Page, ...]:
    """Every page a user reads; CHANGELOG.md, which speaks of the past, has its links alone read."""
    files = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "examples/README.md")]
    files += sorted((ROOT / "docs").glob("*.md"))
    return tuple(Page(file) for file in files)


CHANGELOG = Page(ROOT / "CHANGELOG.md")
