"""What `parallel.compile` is on a machine, and what is said where it cannot be."""

import logging

import pytest

from senseflow.common.files import ROOT
from senseflow.config.config import load_config
from senseflow.config.sections import ParallelConfig
from senseflow.engine import compilation
from senseflow.engine.compilation import settle

AUTO, YES, NO = (ParallelConfig(compile=said) for said in ("auto", True, False))


@pytest.fixture
def no_compiler(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)


def test_auto_is_on_where_there_are_gpus_and_all_it_needs(monkeypatch):
    monkeypatch.setattr(compilation, "what_is_missing", lambda num_gpus: None)
    assert settle(AUTO, num_gpus=8).compiled and not settle(AUTO, num_gpus=0).compiled
    assert settle(YES, num_gpus=0) == settle(YES, num_gpus=8) == YES
    assert settle(NO, num_gpus=0) == settle(NO, num_gpus=8) == NO
    assert not AUTO.compiled


def test_without_a_compiler_auto_is_off_and_says_so_and_true_is_refused(no_compiler, caplog):
    with caplog.at_level(logging.INFO):
        assert not settle(AUTO, num_gpus=0).compiled and caplog.messages == []
        assert not settle(AUTO, num_gpus=2).compiled
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("parallel.compile: auto is off, for torch.compile needs ")
    said = r"parallel\.compile: torch\.compile needs a C\+\+ compiler \(g\+\+ or clang\+\+; CXX"
    with pytest.raises(ValueError, match=said):
        settle(YES, num_gpus=0)
    assert settle(NO, num_gpus=2) == NO


def test_a_compiler_may_be_named(no_compiler, monkeypatch, tmp_path):
    compiler = tmp_path / "mine"
    compiler.touch(0o755)
    monkeypatch.setenv("CXX", "mine -pipe")
    monkeypatch.setattr(compilation.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ValueError, match=r"Python's headers \(.*Python\.h is not there\)"):
        settle(YES, num_gpus=0)
    (tmp_path / "Python.h").touch()
    assert settle(YES, num_gpus=0) == YES


@pytest.mark.parametrize("value", ["1", "maybe", "null"])
def test_other_values_are_refused(value):
    file = ROOT / "configs" / "FLUX" / "flux_senseflow_tiny.yaml"
    with pytest.raises(ValueError, match=r"parallel\.compile: .* none of auto, true, false"):
        load_config(file, [f"parallel.compile={value}"])
