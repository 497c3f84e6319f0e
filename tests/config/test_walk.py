"""The walk over all fields: no value is taken that nobody can have meant."""

import dataclasses
import typing

import pytest
from config_walk import FLUX, REASONS, table, walk

from senseflow.common.fields import FieldError, check
from senseflow.config.config import Config, load_config

STEPS = list(walk())


def test_what_is_taken_has_a_stated_reason():
    assert [(s.key, s.value) for s in STEPS if s.refusal is None and not s.reason] == []
    taken = {(s.key, s.value) for s in STEPS if s.refusal is None}
    assert REASONS.keys() <= taken  # no reason for what is refused


def test_what_is_refused_is_named_by_its_key_and_at_once():
    refused = [s for s in STEPS if s.refusal and s.value != "'off'"]  # paths are named themselves
    assert [s for s in refused if s.key.partition("[")[0] not in s.refusal] == []
    assert max(s.seconds for s in STEPS) < 1


def test_numbers_that_are_none_are_taken_nowhere():
    for value in ("-1", ".nan", ".inf", "1e30"):
        assert [s.key for s in STEPS if s.value == value and s.refusal is None] == []


def test_every_field_is_walked():
    hints = typing.get_type_hints(Config).items()
    fields = {f"{name}.{f.name}" for name, cls in hints if dataclasses.is_dataclass(cls)
              for f in dataclasses.fields(cls)}  # fmt: skip
    assert fields | {"recipe"} == {s.key.partition("[")[0] for s in STEPS}
    assert len([s for s in STEPS if s.refusal]) > 900 and table().count("\n") > len(fields)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("anchors.times=[.nan, 1]", r"anchors.times\[0\] nan must be from 0 to 1000"),
        ("anchors.times=[]", "anchors.times [] is empty: name at least one number"),
        (
            "anchors.steps=[3, 4]",
            "anchors.steps [3, 4]: each divides the number of anchors.times",
        ),
        (
            "anchors.steps=[1, 2]",
            "anchors.steps [1, 2]: each divides the number of anchors.times",
        ),
        ("anchors.steps=[4, 2]", "anchors.steps [4, 2] must be not falling"),
        ("anchors.times=[250, 500]", r"anchors.times [250.0, 500.0] must be falling"),
        ("optimizer.betas=[0.9, 1]", "optimizer.betas[1] 1.0 must be at least 0 and below 1"),
        ("optimizer.lr=" + "9" * 400, "optimizer.lr: expected a number, got 99999"),
        ("optimizer.lr=" + "9" * 5000, "has more digits than can be read"),
        ("train.iter_num=10000000", "train.iter_num 10000000 must be from 1 to 9999999"),
        ("train.batch_size=1000000000", "train.batch_size 1000000000 must be from 1 to 65536"),
        ("adversarial.taps=[2, 2]", "adversarial.taps [2, 2] must be rising"),
        ("dmd.time_range=500", "must be [low, high], not equal"),
        ("paths.cache=" + "x" * 300, "is too long for a path: a name has at most 255 bytes"),
        ("paths.cache=" + "x/" * 3000, "is too long for a path"),
        ("paths.cache=''", "paths.cache is empty"),
        ('paths.cache="a\\0"', "paths.cache 'a\\x00' has a character of code 0"),
        ("lora.targets=['']", "lora.targets[0] is empty"),
    ],
)
def test_overrides_are_held_to_the_same_ranges(override, said):
    with pytest.raises(ValueError) as refused:
        load_config(FLUX, [override])
    message = str(refused.value)
    assert said.replace("\\", "") in message.replace("\\", "")
    assert len(message) < 250 and "\n" not in message


def test_what_a_command_gives_is_checked_by_the_same_rules():
    hints = typing.get_type_hints(Config.__annotations__["train"], include_extras=True)
    (rule,) = hints["seed"].__metadata__
    check("seed", 2**63 - 1, rule)
    with pytest.raises(FieldError, match="seed -1 must be from 0 to 9223372036854775807"):
        check("seed", -1, rule)
