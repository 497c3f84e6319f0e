"""benchmarks.step: weights of normal size, and whole iterations of an embedded recipe."""

import sys

import pytest
import torch
from torch import nn

from benchmarks import step


def test_random_weights_keep_the_variance():
    network = nn.Sequential(nn.Linear(256, 64), nn.LayerNorm(64))
    network.add_module("norm", nn.LayerNorm(64))
    step.randomise(network)
    x = torch.randn(512, 256, generator=torch.Generator().manual_seed(0))
    assert network[0](x).std().item() == pytest.approx(1, abs=0.05)
    assert not network[0].bias.any()
    assert network.norm.weight.eq(1).all() and not network.norm.bias.any()


@pytest.mark.long
def test_every_kind_of_iteration_is_timed_and_counted(monkeypatch, tmp_path, capsys):
    file = tmp_path / "step.md"
    config = "configs/FLUX/flux_senseflow_tiny.yaml"
    flags = ["--repeats", "1", "--data", "cached", "--output", str(file)]
    monkeypatch.setattr(sys, "argv", ["step", "--config", config, *flags, "train.batch_size=2"])
    step.main()
    text = file.read_text()
    assert text in capsys.readouterr().out
    assert "flux_senseflow on 1 x CPU" in text and "images/s" in text
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[4:-1]]
    assert {row[0] for row in rows} >= {
        "plain turn, top anchor of 4",
        "generator turn, top anchor of 4",
    }
    assert all(float(row[2]) > 0 for row in rows)
    assert all(float(row[3]) > 0 for row in rows if row[1] != "optimizer")
