"""What the training loop says when it stops."""

from types import SimpleNamespace

import pytest
from toy import toy_config

from senseflow.engine.checkpoint_folders import MANIFEST
from senseflow.engine.loop import NonFiniteError, Run


def test_a_good_checkpoint_is_promised_only_where_there_is_one(tmp_path):
    measures = SimpleNamespace(read=lambda ranks: {"loss/dmd": float("nan"), "loss/fake": 1.0})
    run = SimpleNamespace(
        config=toy_config(), measures=measures, ranks=None,
        checkpoints=SimpleNamespace(folder=tmp_path),
    )  # fmt: skip
    run.not_finite = lambda *args: Run.not_finite(run, *args)

    def said() -> str:
        with pytest.raises(NonFiniteError) as stopped:
            Run.report(run, None, None, iteration=20, since=10, seconds=1.0)
        return str(stopped.value)

    assert said().startswith("loss/dmd not finite in iterations 11 to 20; no step was taken")
    assert "No checkpoint is there: lower the learning rates (optimizer.lr 0.0" in said()
    (tmp_path / "step_0000010").mkdir()
    assert "No checkpoint is there" in said()  # one without a manifest is not whole
    (tmp_path / "step_0000010" / MANIFEST).touch()
    assert f"The newest checkpoint in {tmp_path} is good: " in said()
