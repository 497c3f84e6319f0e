"""The page of cards: peaks are made up, cells come from trying every rung in turn."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from senseflow.plan import cards
from senseflow.plan.__main__ import main
from senseflow.plan.cards import (
    COUNTS,
    MEMORIES,
    Cell,
    Peaks,
    Rung,
    Unknown,
    first_that_fits,
    ladder,
)
from senseflow.plan.costs import GIB, Gpu
from senseflow.plan.reserve import reserve

FILE = Path("configs/FLUX/flux_senseflow.yaml")
REFUSED = "lora.base=nf4"


def size(wanted) -> int:
    """GiB: less with every override, on more GPUs, and with LoRA."""
    lora = wanted.file.name.endswith("_lora.yaml")
    changes = len(wanted.overrides) + (wanted.data == "cached")
    return (60 if lora else 400) // wanted.gpus - 3 * changes


def made_up(traced: list):
    """In the place of `make_plan`."""

    def plan(wanted, kinds):
        (kind,) = kinds
        assert kind.generator and kind.anchor > 0
        traced.append(wanted)
        if REFUSED in wanted.overrides:
            raise ValueError("no layers of this width")
        return SimpleNamespace(peak=size(wanted) * GIB)

    return plan


def in_turn(count: int, memory: int) -> str:
    """A cell by trying each rung, from the top, of the half whose end fits."""
    room = memory - reserve(count)
    for half in ladder(FILE, count):
        fitting = [r for r in half if REFUSED not in r.wanted.overrides and size(r.wanted) <= room]
        allowed = [r for r in half if REFUSED not in r.wanted.overrides]
        if allowed[-1] in fitting:
            return f"{fitting[0].words}: {size(fitting[0].wanted)}.00"
    return "-"


@pytest.fixture
def page(monkeypatch, tmp_path):
    """Writes the page; returns its lines, and what was traced for them."""
    monkeypatch.setattr(cards, "quiet_libraries", lambda: None)

    def write(limit: int | None = None) -> tuple[list[list[str]], list]:
        traced: list = []
        plan = made_up(traced)

        def stopped(wanted, kinds):
            if limit is not None and len(traced) == limit:
                raise KeyboardInterrupt
            return plan(wanted, kinds)

        monkeypatch.setattr(cards, "make_plan", stopped)
        status = main(["--cards", "--config", str(FILE), "--output", str(tmp_path / "cards.md")])
        assert status == (0 if limit is None else 130)
        text = (tmp_path / "cards.md").read_text()
        lines = [line for line in text.splitlines() if line.startswith("|")]
        rows = [line.strip("|").split("|") for line in lines[2:]]
        return [[cell.strip() for cell in row] for row in rows], traced

    return write


def test_every_cell_is_the_first_rung_that_fits(page):
    rows, traced = page()
    assert [row[1] for row in rows] == [str(count) for count in COUNTS]
    for count, row in zip(COUNTS, rows, strict=True):
        assert row[2:] == [in_turn(count, memory) for memory in MEMORIES], count
    kinds = {cell.split(", ")[0].split(":")[0] for row in rows for cell in row[2:]}
    assert {"as it is", "LoRA", "-"} < kinds, "the made-up peaks show no case of each"
    keys = [(w.file, w.overrides, w.data, w.gpus) for w in traced]
    assert len(keys) == len(set(keys)) < sum(len(h) for n in COUNTS for h in ladder(FILE, n))


def test_a_stopped_page_goes_on_and_says_what_it_lacks(page, tmp_path):
    rows, traced = page(limit=3)
    assert len(traced) == 3 and "not traced" in rows[-1]
    known = json.loads((tmp_path / "cards.json").read_text())
    assert len(known) == 3
    again, more = page()
    assert again == page()[0] and page()[1] == []
    assert not {(w.overrides, w.file) for w in traced} & {(w.overrides, w.file) for w in more}


def test_a_half_ends_before_what_is_refused():
    half = [Rung(str(i), SimpleNamespace()) for i in range(4)]
    peaks = dict(zip("0123", (9, 6, 5, None), strict=True))

    def found(room: int) -> str | None:
        first = first_that_fits([half], lambda r: peaks[r.words] and peaks[r.words] <= room)
        return first and first.words

    assert [found(room) for room in (4, 5, 6, 9)] == [None, "2", "1", "0"]
    assert first_that_fits([half], lambda r: None) is None


def test_more_gpus_bound_fewer():
    """8, 4 and 2 GPUs with 20 GiB of room each, one with 22.5."""
    rung = {n: ladder(FILE, n)[0][3] for n in COUNTS}
    peaks = Peaks(Path("cards.json"), {rung[2].key: 20 * GIB})

    def fits(count: int) -> bool | None:
        return Cell(FILE, count, Gpu(24, 0.4), peaks).fits(rung[count])

    assert fits(2) and fits(4) and fits(8)
    with pytest.raises(Unknown):
        fits(1)
    peaks.known[rung[2].key] = 23 * GIB
    assert fits(2) is False and fits(1) is False
    with pytest.raises(Unknown):
        fits(4)
    peaks.known[rung[4].key] = 19 * GIB
    assert fits(4) and fits(8) and not fits(1)
    peaks.known[rung[8].key] = None
    assert fits(1) is None


def test_the_ladder_of_flux():
    full, lora = ladder(FILE, 8)
    batch = ("train.batch_size=8", "train.grad_accumulation=1")
    assert full[0].words == "as it is" and full[0].wanted.overrides == batch
    assert full[1].wanted.data == "cached" and full[1].wanted.overrides == batch
    assert full[2].wanted.overrides[2:] == (
        "parallel.activation_checkpointing=1", "parallel.recomputation=full"
    )  # fmt: skip
    added = [rung.wanted.overrides[-1] for rung in full[3:6]]
    moments = ["optimizer.head_states=8bit", "optimizer.states=8bit"]
    assert added == [*moments, "precision.masters=bfloat16"]
    assert lora[0].words == "LoRA" and lora[0].wanted.file.name == "flux_senseflow_lora.yaml"
    assert lora[-1].words == "LoRA, the frozen base in 4 bits"
    assert "lora.base=nf4" in lora[-1].wanted.overrides
    other = ladder(Path("configs/SD35/sd35_senseflow.yaml"), 1)[1]
    assert "lora.rank=64" in other[0].wanted.overrides


def test_a_damaged_file_of_peaks_is_named(tmp_path):
    (tmp_path / "cards.json").write_text("[]")
    with pytest.raises(ValueError, match=r"cards\.json holds no JSON object"):
        Peaks.of(tmp_path / "cards.json")


def test_rooms_are_by_card():
    assert replace(Gpu(80, 0.4), memory=24).room(1, 1) == (24 - reserve(1)) * GIB
