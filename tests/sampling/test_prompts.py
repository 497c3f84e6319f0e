"""The prompts of a file: whatever table holds them, they are the same, or the file is refused."""

import csv
import io
import json
import random
import sys
from pathlib import Path

import pytest

from senseflow.common import tables
from senseflow.common.fields import FieldError
from senseflow.evaluate.layouts import LAYOUTS
from senseflow.sampling.cli import build_parser, read_prompts
from senseflow.sampling.prompts import TEXT_COLUMNS, read_prompts_file
from senseflow.teachers.flux.family import FLUX

TEXTS = ["A red car, parked.", 'the word "START" on a wall', "café; 一只猫 🦊", "{red} [cat] | dog"]
SUFFIXES = (
    ".csv", ".tsv", ".tab", ".json", ".jsonl", ".ndjson", ".jsonlines", ".txt", ".CSV", ".Json",
    ".JSONL", ".dat", "", ".yaml", ".parquet",
)  # fmt: skip
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-le", "latin-1")


def write(file: Path, text: str, encoding: str = "utf-8") -> Path:
    file.write_bytes(text.encode(encoding, "replace"))
    return file


def texts(file: Path, **how) -> list[str]:
    return [prompt.text for prompt in read_prompts_file(file, **how)]


# ------------------------------------------------------------------------------- the property


def as_text(form: str, rows: list[dict[str, object]], column: str) -> str:
    """The rows in one of the forms that people keep them in, by its own library."""
    if form in ",\t;|":
        stream = io.StringIO()
        writer = csv.DictWriter(stream, list(rows[0]), delimiter=form)
        writer.writeheader()
        writer.writerows(rows)
        return stream.getvalue()
    if form == "raw tabs":  # as PartiPrompts: no quotes of its own
        return "".join(
            "\t".join(map(str, r)) + "\n" for r in (rows[0], *(r.values() for r in rows))
        )
    if form == "lines":
        return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    tree: object = rows
    if form == "columns":
        tree = {name: [row[name] for row in rows] for name in rows[0]}
    if form == "under a key":
        tree = {"info": {"year": 2014}, "images": [{"file": 1}], "annotations": rows}
    if form == "by name":
        tree = {f"{number:03d}": row for number, row in enumerate(rows)}
    if form == "texts":
        tree = [row[column] for row in rows]
    return json.dumps(tree, indent=random.Random(len(rows)).choice([None, 1]))


@pytest.mark.parametrize(
    "form",
    [
        ",",
        "\t",
        ";",
        "|",
        "raw tabs",
        "lines",
        "list",
        "columns",
        "under a key",
        "by name",
        "texts",
    ],
)
def test_any_table_of_prompts_gives_its_prompts_or_is_refused(form, tmp_path):
    """Columns, their order and case, suffix, encoding, line ends: by chance, from a fixed seed."""
    drawn, refused = random.Random(form), 0
    for number in range(60):
        column = drawn.choice(["prompt", "Prompt", "PROMPTS", "caption", "Caption", "TEXT", "text"])
        names = [column, *drawn.sample(["id", "Category", "url", "key", "Note"], 2)]
        drawn.shuffle(names)
        rows = [
            {name: text if name == column else f"{name} {n}" for name in names}
            for n, text in enumerate(TEXTS)
        ]
        text = as_text(form, rows, column).replace("\r\n", "\n")
        text = text.replace("\n", drawn.choice(["\n", "\r\n"])) + drawn.choice(["", "\n", "\n\n"])
        encoding = drawn.choice(ENCODINGS)
        file = write(tmp_path / f"{number}{drawn.choice(SUFFIXES)}", text, encoding)
        try:
            found = read_prompts_file(file)
        except ValueError as error:
            refused += 1
            assert str(file) in str(error) and "\n" not in str(error)
            assert encoding in ("utf-16-le", "latin-1"), f"{file.name}: {error}"
            continue
        if encoding == "latin-1":  # no letter beyond ASCII: JSON may write them so
            assert text.isascii()
        assert [prompt.text for prompt in found] == TEXTS, file.name
        assert [prompt.index for prompt in found] == [0, 1, 2, 3]
    assert refused < 30


def test_a_column_of_each_name_is_found(tmp_path):
    for name in TEXT_COLUMNS:
        for spelt in (name, name.upper(), name.title(), f" {name} "):
            file = write(tmp_path / "p.csv", f"id,{spelt}\n1,a\n2,b\n")
            assert texts(file) == ["a", "b"]


# ------------------------------------------------------------------ the files as they are published


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        (
            "PartiPrompts.tsv",
            "Prompt\tCategory\tChallenge\tNote\n"
            'a sign reading "Hi", in red\tAbstract\tBasic\t\n'
            '"Toaday" on a page\tAnimals\tPerspective\tLongest word: "a"\n',
            [('a sign reading "Hi", in red', None), ('"Toaday" on a page', None)],
        ),
        (
            "drawbench.csv",
            'Prompts,Category\n"A red car, parked.",Colors\nA black cat,Colors\n',
            [("A red car, parked.", None), ("A black cat", None)],
        ),
        (
            "captions_val2014.json",
            '{"info": {}, "images": [{"id": 7, "file_name": "7.jpg"}], "licenses": [],'
            ' "annotations": [{"image_id": 7, "id": 49, "caption": "A man. "}]}',
            [("A man.", 49)],
        ),
        ("anime.json", '["a girl", "a boy"]', [("a girl", None), ("a boy", None)]),
        (
            "test.json",
            '[{"image_path": ["0.jpg", "1.jpg"], "prompt": "a", "rank": [0, 1]}]',
            [("a", None)],
        ),
        (
            "evaluation_metadata.jsonl",
            '{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a '
            'photo of a bench"}\n',
            [("a photo of a bench", None)],
        ),
        ("mjhq.json", '{"ab12": {"category": "art", "prompt": "a"}}', [("a", "ab12")]),
        ("p.json", '[{"prompt": "a", "id": 7}, "b"]', [("a", 7), ("b", None)]),
        ("p.json", '{"keys": ["x", "y"], "prompts": ["a", "b"]}', [("a", "x"), ("b", "y")]),
        ("p.json", '{"prompts": ["a"]}', [("a", None)]),
        ("p.json", '{"prompt": "a"}', [("a", None)]),
        ("p.json", '{"0.png": "a", "1.png": "b"}', [("a", None), ("b", None)]),
        ("p.jsonl", '{"caption": "a", "image_id": 3}\n\n"b"\n', [("a", 3), ("b", None)]),
        ("p.tsv", 'id\tcaption\n5\ta "quoted" cat\n6\tb\n', [('a "quoted" cat', "5"), ("b", "6")]),
        ("p.tsv", 'id\tcaption\n5\t"a ""b"",\nc"\n', [('a "b",\nc', "5")]),
        ("p.csv", "﻿prompt\r\na\r\n\r\nb\r\n", [("a", None), ("b", None)]),
        ("p.csv", "id,prompt,\n1,a,\n", [("a", "1")]),
        ("p.csv", ",prompt\n0,a\n", [("a", None)]),  # pandas' index has no name
        ("p.tsv", " \n\tprompt\n0\ta\n1\tb\n\n", [("a", None), ("b", None)]),
        ("p.txt", "prompt\na, b and c\nd\n", [("a, b and c", None), ("d", None)]),
        ("p.txt", '"a"\n"b, c"\n', [("a", None), ("b, c", None)]),
        ("p.txt", "id, prompt\n1, a\n", [("a", "1")]),
    ],
)
def test_forms_of_a_prompts_file(name, text, said, tmp_path):
    prompts = read_prompts_file(write(tmp_path / name, text))
    assert [(p.text, p.id) for p in prompts] == said
    assert [p.index for p in prompts] == list(range(len(said)))


@pytest.mark.parametrize(
    "line",
    [
        "a poster, text, neon", "{red|blue} cat", "[photo] a cat", "[[style]] a cat", "{}} a cat",
        '"Hello" says a cat', 'a cat says "Hello"', "prompt engineering: a cat", "a; b; c", "a|b",
        "1. a cat", "- a cat", "#1 a cat", "a\u2028cat", "x" * 200_000,
    ],
)  # fmt: skip
def test_lines_that_are_only_text_are_taken_as_they_are(line, tmp_path):
    assert texts(write(tmp_path / "p.txt", f"\ufeff {line} \r\n\r\n b\n")) == [line, "b"]
    assert texts(write(tmp_path / "old_mac.txt", f"{line}\rb")) == [line, "b"]


def test_what_follows_a_tab_is_cut_where_a_benchmark_has_it_so(tmp_path):
    file = write(tmp_path / "color_val.txt", "a blue two\ttwo, blue\na red seven\n")
    assert texts(file, cut_at_tab=True) == ["a blue two", "a red seven"]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("p.json", "{", "p.json is not valid JSON"),
        ("p.json", "a cat\na dog\n", "p.json is not valid JSON"),
        ("p.json", "[" * 100_000, "p.json is not valid JSON"),
        ("p.txt", '{"prompt": "a"', "p.txt is not valid JSON"),
        ("p.json", '{"x": 1}', "must hold a list of texts or of objects"),
        (
            "p.json",
            '{"keys": ["x"], "prompts": ["a", "b"]}',
            "not of one length: 1 keys, 2 prompts",
        ),
        ("p.json", "[]", "holds no prompts"),
        ("p.json", '{"a": [{"text": "x"}], "b": [{"text": "y"}]}', "rows under a and b"),
        ("p.json", '{"prompt": {"0": "a"}}', "is {'0': 'a'}, not a text"),
        ("p.json", '["a", " "]', "p.json, entry 2 is empty"),
        ("p.json", '["a", 3]', "p.json, entry 2 is 3, not a text"),
        ("p.json", '[{"text": "a"}, {"id": 3}]', "p.json, entry 2 has no text"),
        ("p.json", '[{"text": "a", "Text": "b"}]', "the columns 'text' and 'Text'"),
        ("p.json", '["\\ud83d"]', "entry 1 holds half of a character"),
        ("p.jsonl", '{"prompt": "a"}\n["b"]\n', "p.jsonl, line 2 is"),
        ("p.jsonl", '"a"\n{"prompt"\n', "p.jsonl, line 2 is not valid JSON"),
        ("p.csv", "a cat\na dog\n", "no column of prompts .*; its columns are 'a cat'"),
        ("p.csv", "0.png,cat 0\n1.png,cat 1\n", "its columns are '0.png', 'cat 0'"),
        ("p.csv", "prompt,id\na red car, parked,3\n", "line 2 has 3 cells, its table 2 columns"),
        ("p.csv", "prompt,id\na,1\n\n,2\n", "p.csv, line 4, column 'prompt' is empty"),
        ("p.csv", "id,prompt\n1\n", "p.csv, line 2 has no prompt"),
        ("p.csv", "prompt,prompt\na,b\n", "two columns are called 'prompt'"),
        ("p.csv", 'prompt,id\n"a\nb,1\n', "p.csv, line 2 cannot be used"),
        ("p.csv", 'prompt,id\n"a"b,1\n', "p.csv, line 2 cannot be used"),
        ("p.tsv", "5\ta\n6\tb\n", "no column of prompts"),
        ("p.tsv", f"id\tprompt\n5\ta\n6\t{'x' * 131_073}\n", "p.tsv, line 3 cannot be used"),
        ("p.txt", "a cat\tanimals\na dog\tanimals\n", "p.txt, line 1 has a tab in it"),
        ("p.txt", "0.png,cat 0\n1.png,cat 1\n", "table without names of its columns"),
        ("p.txt", "0, a cat\n1, a dog\n", "table without names of its columns"),
        ("p.txt", " \n\n", "holds no prompts"),
        ("p.yaml", "- a cat\n", "p.yaml is YAML"),
        ("p.parquet", "a cat\n", "parquet by its name alone"),
        (
            "p.txt",
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "pointer of Git LFS",
        ),
        ("p.csv", "<!DOCTYPE html>\n<html>", "is a page"),
        ("p.csv", "PK\x03\x04xl", "ZIP archive, as .xlsx files are"),
        ("p.txt", "a\0b", "NUL characters"),
    ],
)
def test_wrong_prompts_files_are_one_clear_line(name, text, said, tmp_path):
    with pytest.raises(ValueError, match=said) as raised:
        read_prompts_file(write(tmp_path / name, text))
    assert str(tmp_path / name) in str(raised.value) and "\n" not in str(raised.value)


def test_what_is_no_file_of_text(tmp_path):
    (tmp_path / "p.jsonl.gz").write_bytes(b"\x1f\x8b\x08")
    with pytest.raises(ValueError, match=r"p\.jsonl\.gz is a gzip archive: unpack it"):
        read_prompts_file(tmp_path / "p.jsonl.gz")
    with pytest.raises(ValueError, match="is not a file"):
        read_prompts_file(tmp_path)
    (tmp_path / "latin.csv").write_bytes("prompt\ncafé\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.csv is not UTF-8 text .*: save it as UTF-8"):
        read_prompts_file(tmp_path / "latin.csv")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "prompt,Long Caption\nshort,a long one\nbrief,another\n"),
        ("a.txt", "id\tlong caption\n0\ta long one\n1\tanother\n"),
        ("a.jsonl", '{"LONG CAPTION": "a long one"}\n{"LONG CAPTION": "another", "text": "brief"}'),
        (
            "a.json",
            '{"info": 1, "rows": [{"long caption": "a long one"}, {"long caption": "another"}]}',
        ),
    ],
)
def test_a_column_by_any_name(name, text, tmp_path):
    file = write(tmp_path / name, text)
    assert texts(file, named="Long caption") == ["a long one", "another"]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.csv", "text,file\na,b\n", "'blip' is not in {}; its columns are 'text', 'file'"),
        ("a.json", '[{"a": 1, "b": "c"}]', "'blip' is not in {}; its columns are 'a', 'b'"),
        ("a.txt", "a red car\n", "'blip' is not in {}, which has no columns: leave it out"),
        ("a.json", '["a red car"]', "'blip' is not in {}, which has no columns: leave it out"),
    ],
)
def test_a_column_that_is_not_there_is_refused_by_its_name(name, text, said, tmp_path):
    file = write(tmp_path / name, text)
    with pytest.raises(FieldError) as refused:
        read_prompts_file(file, named="blip")
    assert refused.value.as_flag == "--prompts_column " + said.format(file)


def test_every_command_that_reads_prompts_takes_the_column(tmp_path):
    file = write(tmp_path / "a.csv", "prompt,blip\na,b\n")
    line = ["--flux_ckpt", "x", "--prompts_column", "blip"]
    parser = build_parser(FLUX, "flux")
    args = parser.parse_args([*line, "--prompts_file", str(file)])
    assert [prompt.text for prompt in read_prompts(args)] == ["b"]
    for layout in ("seeds", "t2i_compbench"):
        file = write(tmp_path / "color.csv", "prompt,blip\na,b\n")
        (collection,) = LAYOUTS[layout].read([file], "blip")
        assert [prompt.text for prompt in collection.prompts] == ["b"]
    with pytest.raises(ValueError, match="--prompts_column is of a table: name its --prompts_file"):
        read_prompts(parser.parse_args(line))


def test_what_was_found_is_named(tmp_path, caplog):
    caplog.set_level("INFO", "senseflow")
    for name, text, said in (
        ("x.csv", "Prompt,n\na,1\nb,2\n", "2 prompts from column 'Prompt' of "),
        ("x.json", '["a"]', "1 prompts from the list of "),
        ("x.txt", "a\nb\n", "2 prompts from the lines of "),
        ("y.json", '{"z": [{"text": "a"}]}', "1 prompts from column 'text' under 'z' of "),
    ):
        file = write(tmp_path / name, text)
        caplog.clear()
        read_prompts_file(file)
        assert caplog.messages == [f"{said}{file}"]


# ------------------------------------------------------------------------------------------ parquet


def test_parquet_without_pyarrow_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "0.csv").write_bytes(b"PAR1....PAR1")  # whatever it is called
    with pytest.raises(ValueError, match=r"0\.csv is parquet, which needs pyarrow: pip install"):
        read_prompts_file(tmp_path / "0.csv")


def test_img2datasets_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    for column in ("caption", "TEXT"):
        table = pyarrow.table(
            {
                "url": ["http://a", "http://b"],
                column: TEXTS[1:3],
                "key": ["000000000", "000000001"],
                "status": ["success", "failed_to_download"],
                "width": pyarrow.array([512, None], pyarrow.int32()),
                "image": [{"bytes": b"\x89PNG"}, {"bytes": b"\x89PNG"}],
            }
        )
        file = tmp_path / "00000.parquet"
        parquet.write_table(table, file)
        prompts = read_prompts_file(file)
        assert [(p.text, p.id) for p in prompts] == [
            (TEXTS[1], "000000000"), (TEXTS[2], "000000001"),
        ]  # fmt: skip
        assert "image" not in prompts[0].record
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match="cannot be read as parquet") as raised:
        read_prompts_file(file)
    assert "\n" not in str(raised.value)
    parquet.write_table(pyarrow.table({"a": ["x"], "text": [None]}), file)
    with pytest.raises(ValueError, match="row 1 has no text"):
        read_prompts_file(file)


def test_nothing_heavy_is_imported_for_it():
    assert "pyarrow" not in vars(tables)
