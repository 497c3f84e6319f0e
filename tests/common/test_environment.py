"""What torchrun's variables say, and what is said of garbage in them, by every reader of them."""

from functools import partial

import pytest
from command_line import error_of

from senseflow.common.devices import find_device
from senseflow.common.environment import Position, own_position
from senseflow.config.recipes import RECIPES
from senseflow.engine.share import Share
from senseflow.launch.entry import main
from senseflow.sampling.job import shard_of
from senseflow.teachers.flux.family import FLUX

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")
READERS = (own_position, Share.of_torchrun, partial(shard_of, None), partial(find_device, None))


def test_a_process_is_one_of_one_unless_torchrun_says_more(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    assert own_position() == Position(0, 0, 1)
    for name, value in zip(NAMES, ("9", "1", "16", ""), strict=True):
        monkeypatch.setenv(name, value)
    assert own_position() == Position(9, 1, 16)
    assert shard_of(None) == (9, 16) and shard_of("1/2") == (1, 2)


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in NAMES for value in ("four", "1.5", "-1", "9" * 5000)]
    + [("RANK", "1"), ("WORLD_SIZE", "0"), ("MASTER_PORT", "70000")],
)
def test_garbage_is_one_line_that_names_the_variable(name, value, monkeypatch):
    for other in NAMES:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, value)
    for reader in READERS:
        with pytest.raises(ValueError, match=f"^{name} ") as said:
            reader()
        assert len(str(said.value)) < 200 and "\n" not in str(said.value)


def test_commands_and_a_training_process_say_it(monkeypatch, capsys, flux_folder, tmp_path):
    monkeypatch.setenv("RANK", "first")
    said = "error: RANK of the environment: 'first' is not a whole number"
    flags = ("--teacher", "--prompt", "a", "--output_dir", tmp_path)
    assert error_of(capsys, FLUX, flux_folder, *flags) == said
    monkeypatch.setattr("sys.argv", ["x", "--worker", "none.yaml", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        main(RECIPES["flux_senseflow"])
    assert ended.value.code == said
