"""What a flow teacher's scheduler says of its shift."""

import json

import pytest

from senseflow.teachers.flow import flow_config


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"shift": 0}, "shift is 0, and must be a number above 0"),
        ({"shift": -3.0}, "shift is -3.0, and must be a number above 0"),
        ({"shift": float("nan")}, "shift is nan, and must be a number above 0"),
        ({"shift": None}, "shift is null, and must be a number above 0"),
        ({"shift": "3"}, "shift is '3', and must be a number above 0"),
        ({"use_dynamic_shifting": True, "max_shift": None}, "max_shift is null, and must be a num"),
        ({"use_dynamic_shifting": True, "base_shift": "a"}, "base_shift is 'a', and must be a num"),
    ],
)
def test_a_shift_that_is_none_is_named_with_its_file(tmp_path, config, said):
    with pytest.raises(ValueError, match=said) as error:
        flow_config(written(tmp_path, config))
    assert "scheduler_config.json: " in str(error.value) and "\n" not in str(error.value)


def test_a_shift_that_is_not_asked_for_may_be_anything(tmp_path):
    assert flow_config(written(tmp_path, {}))["shift"] == 1
    assert flow_config(written(tmp_path, {"use_dynamic_shifting": True, "shift": None}))
    assert flow_config(written(tmp_path, {"max_shift": None, "shift": 3}))["shift"] == 3


def written(folder, config):
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    return folder
