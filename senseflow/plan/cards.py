"""Which recipe for which card: every family on several cards, the least that is changed first.

A ladder is tried for each family and number of GPUs: all weights, with the changes of
`senseflow.plan.remedies` one after the other, each beside those before it; then LoRA in the same
way. A rung's peak, of a generator turn, which has every phase, depends on no card, and peaks fall
down each half of the ladder and with the number of GPUs; so the first rung that fits a card is
found by halving, and what was traced for one card and number serves the others. Peaks are kept in
a file beside the page, written after each trace: a stopped command goes on, and the page has what
is known so far.
"""

import json
import logging
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from senseflow.common.files import read_json, write_whole
from senseflow.common.quiet import quiet_libraries
from senseflow.common.templates import templates
from senseflow.config.config import load_config
from senseflow.config.recipes import RECIPES
from senseflow.plan.costs import Gpu, kinds_of, likely_worst_first
from senseflow.plan.plan import Wanted, data_of, make_plan
from senseflow.plan.remedies import changed, exact, inexact
from senseflow.plan.text import gib

logger = logging.getLogger(__name__)

MEMORIES = (24, 40, 48, 80, 141)  # GiB: an RTX 4090; A100s; an L40S; an H100; an H200
COUNTS = (1, 2, 4, 8)
LORA_RANK = 64  # where a recipe has no file of its own for it, as in those that there are


@dataclass(frozen=True)
class Rung:
    """A configuration on a ladder."""

    words: str  # of the last change, which is made beside those before it
    wanted: Wanted

    @property
    def key(self) -> str:
        """What its peak is kept under."""
        file, data = self.wanted.file, self.wanted.data or "as its recipe"
        return " ".join([f"{file.parent.name}/{file.name}", data, *self.wanted.overrides])


@dataclass
class Peaks:
    """What has been traced: bytes by key, None where the configuration is refused."""

    file: Path
    known: dict[str, int | None] = field(default_factory=dict)

    @classmethod
    def of(cls, file: Path) -> "Peaks":
        """Those of a file; raises ValueError for one that holds no JSON object."""
        return cls(file, read_json(file) if file.exists() else {})

    def trace(self, rung: Rung) -> None:
        """Trace a rung unless it is known, and write the file."""
        if rung.key in self.known:
            return
        started, wanted = time.process_time(), rung.wanted
        try:
            config = load_config(wanted.file, list(wanted.overrides))
            peak = make_plan(wanted, likely_worst_first(kinds_of(config))[:1]).peak
            self.known[rung.key], said = peak, f"{gib(peak)} GiB"
        except ValueError as error:  # such as a base in 4 bits where a layer's width is odd
            self.known[rung.key], said = None, f"refused: {error}"
        spent = time.process_time() - started
        logger.info("%s, %d GPUs: %s; %.0f CPU s", rung.key, wanted.world_size, said, spent)
        write_whole(self.file, json.dumps(self.known, indent=1) + "\n")


@cache
def ladder(file: Path, count: int) -> tuple[list[Rung], list[Rung]]:
    """All weights, and LoRA, of a recipe on so many GPUs of one node, a sample on each."""
    batch = (f"train.batch_size={count}", "train.grad_accumulation=1")
    lora = file.with_name(f"{file.stem}_lora.yaml")
    if lora.exists():
        adapters = Wanted(lora, batch, 1, count)
    else:
        adapters = Wanted(file, (*batch, f"lora.rank={LORA_RANK}"), 1, count)
    return list(rungs(Wanted(file, batch, 1, count))), list(rungs(adapters, "LoRA"))


@cache
def key_of(file: Path, count: int, words: str) -> str:
    """Of the rung of these words on so many GPUs."""
    return next(r.key for half in ladder(file, count) for r in half if r.words == words)


def rungs(wanted: Wanted, name: str = "") -> Iterator[Rung]:
    """A configuration, and it with the first one, two, ... of its changes; name: of their half."""
    config = load_config(wanted.file, list(wanted.overrides))
    data = data_of(config, RECIPES[config.recipe])
    changes = tuple(exact(config, wanted.world_size, data) + inexact(config))
    yield Rung(name or "as it is", wanted)
    for num, change in enumerate(changes, 1):
        words = f"{name}, {change.words}" if name else change.words
        yield Rung(words, changed(wanted, changes[:num]))


class Unknown(Exception):
    """Whether a rung fits hangs on a trace that has not been made."""

    def __init__(self, rung: Rung) -> None:
        super().__init__(rung.key)
        self.rung = rung


@dataclass(frozen=True)
class Cell:
    """A recipe on so many GPUs of one size."""

    file: Path
    count: int
    gpu: Gpu
    peaks: Peaks

    def fits(self, rung: Rung) -> bool | None:
        """None where it is refused, whatever the number of GPUs. Raises Unknown.

        More GPUs hold no more each: a peak on fewer is an upper bound, one on more a lower one.
        """
        room, known = self.gpu.room(self.count, 1), self.peaks.known
        keys = {n: key_of(self.file, n, rung.words) for n in COUNTS}
        peaks = {n: known[key] for n, key in keys.items() if key in known}
        if None in peaks.values():
            return None
        if any(n <= self.count and peak is not None and peak <= room for n, peak in peaks.items()):
            return True
        if any(n >= self.count and peak is not None and peak > room for n, peak in peaks.items()):
            return False
        raise Unknown(rung)

    def answer(self) -> Rung | None:
        """The first rung that fits, whose peak is known; None: none does. Raises Unknown."""
        found = first_that_fits(ladder(self.file, self.count), self.fits)
        if found is not None and found.key not in self.peaks.known:
            raise Unknown(found)
        return found


def first_that_fits(
    halves: Sequence[Sequence[Rung]], fits: Callable[[Rung], bool | None]
) -> Rung | None:
    """The first rung that fits, by halving within a half; None: none does.

    fits: None where a rung is refused: its half ends before it. What may be refused, a base in few
    bits, comes last.
    """
    for half in halves:
        taken, last = len(half), None
        while taken and (last := fits(half[taken - 1])) is None:
            taken -= 1
        if last:
            return half[bisect_left(half, True, hi=taken - 1, key=lambda rung: bool(fits(rung)))]
    return None


def whole_cards(files: Sequence[Path], output: Path, gpu: Gpu) -> None:
    """Trace what is not known, and write the page after each trace."""
    quiet_libraries()
    peaks = Peaks.of(output.with_suffix(".json"))
    write_whole(output, page(files, peaks, gpu))
    for file in files:
        # The most first: what is too much for each of them is too much for each of fewer.
        for count in reversed(COUNTS):
            for memory in MEMORIES:
                cell = Cell(file, count, replace(gpu, memory=memory), peaks)
                while missing := missing_of(cell):
                    peaks.trace(missing)
                    write_whole(output, page(files, peaks, gpu))


def missing_of(cell: Cell) -> Rung | None:
    """The rung that must be traced next to know this cell; None: it is known."""
    try:
        cell.answer()
    except Unknown as unknown:
        return unknown.rung
    return None


def page(files: Sequence[Path], peaks: Peaks, gpu: Gpu) -> str:
    """The Markdown page of what is known."""
    recipes = [load_config(file).recipe for file in files]
    lines = []
    for file, recipe in zip(files, recipes, strict=True):
        for count in COUNTS:
            cells = [words_of(Cell(file, count, replace(gpu, memory=m), peaks)) for m in MEMORIES]
            lines.append([recipe if count == COUNTS[0] else "", str(count), *cells])
    template = templates(Path(__file__).parent).get_template("cards.md.j2")
    return template.render(
        heads=["recipe", "GPUs", *(f"{memory} GB" for memory in MEMORIES)],
        lines=lines,
        rank=LORA_RANK,
    )


def words_of(cell: Cell) -> str:
    """The first rung that fits, with its peak in GiB."""
    try:
        found = cell.answer()
    except Unknown:
        return "not traced"
    return "-" if found is None else f"{found.words}: {gib(cell.peaks.known[found.key] or 0)}"
