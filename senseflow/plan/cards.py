"""Which recipe for which card: every family on several cards, the least that is changed first.

A ladder is tried for each family and number of GPUs: all weights, with the changes of
`senseflow.plan.remedies` one after the other, each beside those before it; then LoRA in the same
way. A rung's peak, of a generator turn, which has every phase, depends on no card, and peaks fall
down each half of the ladder; so the first rung that fits a card is found by halving, and what was
traced for one card serves the others. Peaks are kept in a file beside the page, written after each
trace: a stopped command goes on, and the page has what is known so far.
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
from senseflow.plan.costs import Gpu
from senseflow.plan.fit import likely_worst_first
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
            peak = make_plan(wanted, likely_worst_first(config)[:1]).peak
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


def rungs(wanted: Wanted, name: str = "") -> Iterator[Rung]:
    """A configuration, and it with the first one, two, ... of its changes; name: of their half."""
    config = load_config(wanted.file, list(wanted.overrides))
    data = data_of(config, RECIPES[config.recipe])
    changes = tuple(exact(config, wanted.world_size, data) + inexact(config))
    yield Rung(name or "as it is", wanted)
    for num, change in enumerate(changes, 1):
        words = f"{name}, {change.words}" if name else change.words
        yield Rung(words, changed(wanted, changes[:num]))


def first_that_fits(
    halves: Sequence[Sequence[Rung]], peak_of: Callable[[Rung], int | None], room: float
) -> Rung | None:
    """The first rung whose peak has room, by halving within a half; None: none has.

    peak_of: bytes; None where a rung is refused: its half ends before it. What may be refused, a
    base in few bits, comes last.
    """

    def fits(rung: Rung) -> bool:
        peak = peak_of(rung)
        return peak is not None and peak <= room

    for half in halves:
        taken = len(half)
        while taken and peak_of(half[taken - 1]) is None:
            taken -= 1
        if taken and fits(half[taken - 1]):
            return half[bisect_left(half, True, hi=taken - 1, key=fits)]
    return None


class Unknown(Exception):
    """A cell hangs on what has not been traced."""


def whole_cards(files: Sequence[Path], output: Path, gpu: Gpu) -> None:
    """Trace what is not known, and write the page after each trace."""
    quiet_libraries()
    peaks = Peaks.of(output.with_suffix(".json"))
    write_whole(output, page(files, peaks, gpu))
    for file in files:
        for count in COUNTS:
            for memory in MEMORIES:
                while missing := missing_of(file, count, replace(gpu, memory=memory), peaks):
                    peaks.trace(missing)
                    write_whole(output, page(files, peaks, gpu))


def missing_of(file: Path, count: int, gpu: Gpu, peaks: Peaks) -> Rung | None:
    """The rung that must be traced next to know this cell; None: it is known."""
    asked: list[Rung] = []

    def peak_of(rung: Rung) -> int | None:
        if rung.key not in peaks.known:
            asked.append(rung)
            raise Unknown
        return peaks.known[rung.key]

    try:
        first_that_fits(ladder(file, count), peak_of, gpu.room(count, 1))
    except Unknown:
        return asked[0]
    return None


def page(files: Sequence[Path], peaks: Peaks, gpu: Gpu) -> str:
    """The Markdown page of what is known."""
    recipes = [load_config(file).recipe for file in files]
    lines = []
    for file, recipe in zip(files, recipes, strict=True):
        for count in COUNTS:
            cells = [cell(file, count, replace(gpu, memory=m), peaks) for m in MEMORIES]
            lines.append([recipe if count == COUNTS[0] else "", str(count), *cells])
    template = templates(Path(__file__).parent).get_template("cards.md.j2")
    return template.render(
        heads=["recipe", "GPUs", *(f"{memory} GB" for memory in MEMORIES)],
        lines=lines,
        rank=LORA_RANK,
    )


def cell(file: Path, count: int, gpu: Gpu, peaks: Peaks) -> str:
    """The first rung that fits, with its peak in GiB."""
    if missing_of(file, count, gpu, peaks):
        return "not traced"
    found = first_that_fits(
        ladder(file, count), lambda rung: peaks.known[rung.key], gpu.room(count, 1)
    )
    if found is None:
        return "-"
    return f"{found.words}: {gib(peaks.known[found.key] or 0)}"
