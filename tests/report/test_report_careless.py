"""The report of broken, empty and unfinished runs, and what wrong flags are told."""

import json
import logging
from pathlib import Path

import pytest
from made_up_run import (
    LONG_PROMPT,
    make_samples,
    picture,
    rows,
    write_rows,
)
from report_page import write
from statuses import status_of

from senseflow.report import __main__ as report

PROMPTS = ["a red seven", "a <b>blue</b> two & a “green” one", LONG_PROMPT]


def error_of(capsys, *words: str | Path) -> str:
    assert status_of(report.main, list(map(str, words))) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1, said
    return said


def test_wrong_paths_are_errors_in_one_line(run, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("{")
    (tmp_path / "object.json").write_text('{"a": 1}')
    (tmp_path / "short.json").write_text('[{"name": "x", "metric": "FID-T"}]')
    out = ("--output", tmp_path / "out.html")
    assert "no such folder" in error_of(capsys, tmp_path / "none", *out)
    said = error_of(capsys, tmp_path / "file", *out)
    assert f"{tmp_path / 'file'} is a file: name its run folder, such as {tmp_path}" in said
    assert "neither config.yaml nor stats.jsonl" in error_of(capsys, tmp_path / "empty", *out)
    assert "is a folder: name a file" in error_of(capsys, run, "--output", tmp_path / "empty")
    assert "cannot be read" in error_of(capsys, run, "--results", tmp_path / "none", *out)
    assert "is not a results file" in error_of(capsys, run, "--results", tmp_path / "file", *out)
    assert "holds no list" in error_of(capsys, run, "--results", tmp_path / "object.json", *out)
    said = error_of(capsys, run, "--results", tmp_path / "short.json", *out)
    assert f"{tmp_path / 'short.json'}, entry 0 has no 'value'" in said
    (tmp_path / "three.json").write_text('[{"name": "x", "metric": "FID-T", "value": 1}]')
    said = error_of(capsys, run, "--results", tmp_path / "three.json", *out)
    assert f"{tmp_path / 'three.json'}, entry 0 has no 'num_images'" in said
    assert "--num_strips: 0 must be" in error_of(capsys, run, "--num_strips", "0", *out)
    for flag in ("--teacher_images", "--student_images"):
        assert f"{flag} {tmp_path}/none is not" in error_of(
            capsys, run, flag, tmp_path / "none", *out
        )
        assert "holds no image with" in error_of(capsys, run, flag, tmp_path / "empty", *out)
    assert not (tmp_path / "out.html").exists()


def test_an_output_that_cannot_be_written_leaves_nothing(run, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    said = error_of(capsys, run, "--output", tmp_path / "file" / "report.html")
    assert "report.html" in said or "file" in said
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_an_empty_and_a_half_written_stats_file(own):
    (own / "stats.jsonl").write_text("")
    (own / "last_iter").unlink()
    page = write(own)
    assert "stats.jsonl is empty" in page.text and "no curves to look at yet" in page.text
    assert "0 of 400" in page.text
    whole = "".join(json.dumps(row) + "\n" for row in rows(20))
    (own / "stats.jsonl").write_text(whole + '{"iteration": 210, "loss/dm')
    page = write(own)
    assert "last row of stats.jsonl is half written" in page.text and "200 of 400" in page.text
    lines = whole.splitlines()
    lines[3] = "\x00\x00garbage"
    lines[5] = '{"iteration": 60, "loss/dmd": "much"}'
    (own / "stats.jsonl").write_text("\n".join(lines) + "\n")
    assert "2 rows of stats.jsonl cannot be read and left out: 4, 6." in write(own).text


def test_rows_that_are_not_finite(own):
    """Python's json writes them as NaN and Infinity."""
    made = rows()
    made[5]["loss/dmd"], made[6]["ida/gap"] = float("nan"), float("inf")
    write_rows(own, made)
    page = write(own)
    assert "loss/dmd is not finite in 1 row, first at 60" in page.text


@pytest.mark.parametrize(
    "values", [[0.0] * 20, [-5.0] * 20, [1e30, 1e-30] * 10, [float("nan")] * 20]
)
def test_curves_of_any_shape_are_drawn(own, values):
    write_rows(own, [{"iteration": k + 1, "loss/dmd": v} for k, v in enumerate(values)])
    page = write(own)
    assert any((a.get("aria-label") or "").startswith("loss/dmd: ") for a in page.all("svg"))


def test_a_single_row(own):
    write_rows(own, rows(1))
    text = write(own).text
    assert "trends are not judged" in text
    assert "rules found anything suspicious" not in text


def test_missing_parts_are_notices(own):
    for file in (own / "samples").iterdir():
        file.unlink()
    (own / "config.yaml").write_text("a: [1")
    page = write(own)
    assert "There are no strips in samples/" in page.text
    assert "config.yaml is not valid YAML" in page.text
    (own / "config.yaml").write_text("just words")
    assert "config.yaml holds no sections" in write(own).text
    (own / "config.yaml").unlink()
    assert "There is no config.yaml" in write(own).text
    (own / "config.yaml").write_text("recipe: my_own\ntrain: 3\n")
    assert "No published YAML of this recipe was found" in write(own).text


def test_corrupt_pictures_are_notices(own, tmp_path, caplog):
    strip = own / "samples" / "step_0000200.png"
    strip.write_bytes(strip.read_bytes()[: strip.stat().st_size // 2])
    teacher = make_samples(tmp_path / "teacher", PROMPTS[:2])
    (teacher / "00001_image.png").write_text("not a picture")
    with caplog.at_level(logging.WARNING):
        page = write(own, "--teacher_images", teacher)
    for said in (
        "step_0000200.png cannot be shown: image file is trunc",
        "00001_image.png is not a",
    ):
        assert said in page.text and said in caplog.text
    assert len(page.all("img")) == 3


def test_samples_without_their_json_are_named(run, tmp_path):
    teacher = make_samples(tmp_path / "teacher", PROMPTS[:2])
    (teacher / "00000_image.json").unlink()
    picture(teacher / "mine.png", (8, 8))
    page = write(run, "--teacher_images", teacher, output=tmp_path / "p.html")
    assert "2 images of" in page.text and "00000_image.png, mine.png" in page.text


def test_running_twice_replaces_the_page(own):
    write(own)
    first = (own / "report.html").read_text()
    write_rows(own, rows(10))
    write(own)
    assert (own / "report.html").read_text() != first
    assert not list(own.glob("*.partial"))


def test_one_row_is_one_row(own):
    write_rows(own, rows(1))
    (own / "stats.jsonl").write_text((own / "stats.jsonl").read_text() * 2)
    page = write(own)
    assert "1 row of stats.jsonl over" in page.text and "1 rows" not in page.text
    assert "stats.jsonl has 1 row of iterations it has already" in page.text
