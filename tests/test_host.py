"""The host's time: a mean by hand, and the program on a network of two blocks."""

import sys
from dataclasses import replace

import pytest

from benchmarks import host
from senseflow.common.files import ROOT
from senseflow.config.config import load_config

FLUX = ROOT / "configs" / "FLUX" / "flux_senseflow.yaml"


def test_the_mean_iteration_is_made_of_passes_as_the_turns_ask_for_them():
    """FLUX: .75 simulated steps, one turn of five a generator's: 1.2 times both ways; without
    gradients .75 + .8 x 1 + .2 x 4."""
    passes = host.Passes(forward=1.0, backward=2.0, no_grad=10.0)
    assert passes.mean(load_config(FLUX)) == pytest.approx(1.2 * 3 + 2.35 * 10)
    # Gathered anew after phi's step, and in one turn of five after theta's and after IDA.
    kept = replace(passes, anew=100.0)
    assert kept.mean(load_config(FLUX)) == pytest.approx(1.2 * 3 + 2.35 * 10 + 1.4 * 100)
    without = load_config(FLUX, ["ida.lam=null"])
    assert kept.mean(without) == pytest.approx(1.2 * 3 + 2.35 * 10 + 1.2 * 100)


def test_every_way_to_run_the_blocks_is_measured(monkeypatch, capsys):
    shallow = host.NARROW["FluxTransformer2DModel"] | dict(num_layers=1, num_single_layers=1)
    monkeypatch.setitem(host.NARROW, "FluxTransformer2DModel", shallow)
    monkeypatch.setattr(sys, "argv", ["host", "--config", str(FLUX), "--repeats", "1"])
    host.main()
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.strip().splitlines()[2:]]
    assert [[cell.strip() for cell in row[1:4]] for row in rows] == [
        [name, "eager", kept]
        for name in ("nothing", "full", "selective")
        for kept in ("", "gathered")
    ]
    assert "3 units" in rows[0][0] and "us an operation" in rows[1][0]
