"""benchmarks.gpu: its pieces are there, and none ends another."""

import sys

import pytest

from benchmarks import gpu
from benchmarks.gpu import Piece, pieces, run_all
from senseflow.common.files import ROOT


def test_a_piece_that_fails_or_hangs_ends_no_other(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu, "LEAST_S", 0.2)
    chosen = [
        Piece("fails", ["-c", "raise SystemExit(3)"], 60),
        Piece("hangs", ["-c", "import time; time.sleep(60)"], 1),
        Piece("works", ["-c", "print('as it should')"], 60),
    ]
    assert run_all(chosen, tmp_path / "out", 120) == 2
    summary = (tmp_path / "out" / "summary.md").read_text()
    for words in ("| fails | exit status 3 |", "| hangs | longer than 1 s |", "| works | done |"):
        assert words in summary
    assert (tmp_path / "out" / "works.log").read_text() == "as it should\n"
    assert run_all(chosen[:1], tmp_path / "out", 0) == 1
    assert "| fails | no time left | 0 |" in (tmp_path / "out" / "summary.md").read_text()


def test_its_pieces_name_what_is_there(tmp_path):
    """Files of the repository, and tests whose words match one."""
    names = [piece.name for piece in pieces(tmp_path)]
    assert len(set(names)) == len(names)
    tests = (ROOT / "tests" / "test_gpu.py").read_text()
    for piece in pieces(tmp_path):
        words = list(piece.words)
        for name in words:
            if name.endswith((".yaml", ".py")):
                assert (ROOT / name).is_file()
        if "-k" in words:
            assert words[words.index("-k") + 1].split(" and ")[0] in tests


def test_minutes_are_a_number(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu", "--output", "x", "--minutes", "-1"])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "--minutes" in capsys.readouterr().err
