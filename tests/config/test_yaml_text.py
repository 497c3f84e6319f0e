"""A value is what it looks like, and no text takes long to read or to refuse."""

import re
import time
from pathlib import Path

import pytest
import yaml

from senseflow.config.config import load_config
from senseflow.config.yaml_text import dump_yaml, parse_yaml, read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5), ("1e5", 1e5), ("+5", 5), ("-0.5", -0.5), ("1_000", 1000), ("0x1f", 31),
        (".5", 0.5), ("5.", 5.0), ("-.inf", float("-inf")), ("on", True), ("~", None), ("", None),
        # what YAML 1.1 has as 256, 8.5, 90, 5400.5 and a date, and plain words of programs
        ("0400", "0400"), ("010.5", "010.5"), ("1:30", "1:30"), ("1:30:00.5", "1:30:00.5"),
        ("2026-01-01", "2026-01-01"), ("nan", "nan"), ("-inf", "-inf"), ("0o17", "0o17"),
    ],
)  # fmt: skip
def test_a_value_is_what_it_looks_like(text, value):
    assert parse_yaml(f"a: {text}", "x") == {"a": value}
    assert type(parse_yaml(f"a: {text}", "x")["a"]) is type(value)
    assert parse_yaml(dump_yaml({"a": value}), "x") == {"a": value}


@pytest.mark.parametrize("value", ["1e5", "0400", "off", "null", "", "a: b", "=", "<<", "12"])
def test_text_that_looks_like_something_else_is_written_in_quotes(value):
    assert parse_yaml(dump_yaml({"a": value}), "x") == {"a": value}


def test_a_name_for_a_section_stands_for_a_copy_of_it():
    tree = parse_yaml("a: &x {b: 1, c: [2]}\nd: *x\ne: {<<: *x, b: 3}", "x")
    assert tree == {"a": {"b": 1, "c": [2]}, "d": {"b": 1, "c": [2]}, "e": {"b": 3, "c": [2]}}
    assert tree["a"] is not tree["d"] and tree["a"]["c"] is not tree["e"]["c"]


LAUGHS = "a0: &a0 [1, 1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 15))
MERGED = "a0: &a0 {x: 1}\n" + "".join(
    f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 15)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train: {}\ndmd: {}\ntrain: {}", "line 3, column 1: the key train stands here a second"),
        ("train: {seed: 1, seed: 2}", "line 1, column 18: the key seed stands here a second time"),
        ("a: !!python/object:os.system {}", "line 1, column 4: the tag tag:yaml.org"),
        ("a: !!int '0400'", "the tag tag:yaml.org,2002:int: write the value as it is"),
        ("a: &x [*x]", "*x stands within itself"),
        ("? [a]\n: b", "found unhashable key"),
        ("a: 1\n---\nb: 2", "found another document"),
        ("a: \0", "unacceptable character #x0000"),
        ("a: " + "9" * 5000, "a number has more digits than can be read"),
        (LAUGHS, "more than 20000 values"),
        (MERGED, "more than 20000 values"),
        ("[" * 5000, "its lists or sections are nested too deeply"),
        ("{a: " * 5000, "its lists or sections are nested too deeply"),
        ("a: !" + "x" * 30000, "is not valid YAML"),
    ],
)
def test_what_is_no_configuration_is_said_in_a_line_and_at_once(tmp_path, text, said):
    file = tmp_path / "a.yaml"
    file.write_text(text)
    began = time.process_time()
    with pytest.raises(ValueError) as refused:
        read_yaml(file)
    assert time.process_time() - began < 3  # of a busy machine too
    message = str(refused.value)
    assert message.startswith(str(file)) and said in message and "\n" not in message
    assert len(message) < len(str(file)) + 250


def test_a_file_of_a_gigabyte_is_not_read(tmp_path):
    file = tmp_path / "a.yaml"
    with file.open("wb") as stream:
        stream.truncate(2**30)
    began = time.process_time()
    with pytest.raises(ValueError, match=r"a.yaml has more than 32 KiB: it is no configuration"):
        load_config(file)
    assert time.process_time() - began < 1


def test_our_files_read_as_pyyaml_reads_them_but_for_exponents():
    """PyYAML is the other reader; it has 1e-5 as text."""
    text = Path("configs/ablation.yaml").read_text()
    assert parse_yaml(text, "x") == yaml.safe_load(re.sub(r"\b(\d)e-", r"\1.0e-", text))
