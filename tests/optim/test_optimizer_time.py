"""benchmarks/optimizer_time.py: its bytes are what arithmetic says, its table has every kind."""

import sys
from functools import partial

import pytest
import torch
from torch import nn

from benchmarks import optimizer_time

NUM = 2**14
WORD = 8  # of the random bits: one number is made for each element, joined, and read


def counted(kind: tuple[torch.dtype, str], joined: bool) -> float:
    """Bytes for each element; the counters of steps, a few bytes of the whole, apart."""
    optimizer = optimizer_time.optimizer_of(kind, False, "cpu", NUM)
    return optimizer_time.bytes_of(optimizer, joined) / NUM


def test_torchs_own_adamw_reads_four_and_writes_three():
    weight = nn.Parameter(torch.ones(NUM // 64, 64))
    optimizer_time.give_gradient(weight)
    count = optimizer_time.bytes_of(torch.optim.AdamW([weight], fused=True), False)
    assert count / NUM == pytest.approx(4 * 4 + 3 * 4, abs=0.1)


@pytest.mark.parametrize(
    "kind, kept", [((torch.bfloat16, "8bit"), 4 + 2 + 8 / 64), ((torch.bfloat16, "bfloat16"), 8)]
)
def test_bytes_of_compiled_steps(kind, kept):
    """kept: of weight, gradient and moments. They are joined (read, written), opened to float32,
    moved by torch's AdamW, closed (the values and, for a bad step, those of before), copied."""
    words = WORD + 2 * WORD
    opened, moved, closed = kept + 16, 28, 16 + kept + WORD + (kept - 2)
    expected = words + 2 * kept + opened + moved + closed + 2 * (kept - 2)
    assert counted(kind, True) == pytest.approx(expected, abs=0.6)
    assert counted(kind, False) > 4 * expected


@pytest.mark.long
def test_the_table_has_every_kind(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    output = tmp_path / "time.md"
    monkeypatch.setattr(sys, "argv", ["time", "--elements", str(NUM), "--output", str(output)])
    threads = torch.get_num_threads()
    optimizer_time.main()
    torch.set_num_threads(threads)
    lines = output.read_text().splitlines()
    assert len(lines) == 2 + 6 and all(line.count("|") == 7 for line in lines)
