"""`python -m senseflow.evaluate table`, and the fragment of HTML for the report."""

import json
import re
from html.parser import HTMLParser

import pytest

from senseflow.evaluate.__main__ import main
from senseflow.evaluate.results import check_result, merge
from senseflow.evaluate.table import PUBLISHED, compare, results_table_html

SHA = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


def entry(name: str, metric: str, value: float, num: int = 5000, **more) -> dict:
    """A result as `score` writes it."""
    told = {
        "name": name, "metric": metric, "value": value, "num_images": num, "num_prompts": num,
        "images": f"out/{name}", "reference": None, "model": "a model", "preprocessing": "crop",
        "weights": [{"file": "/w/inception.pth", "sha256": SHA}], "versions": {"torch": "2.15.0"},
        "settings": {}, "notes": [],
    }  # fmt: skip
    return {**told, **more}


class Cells(HTMLParser):
    """The texts of a table's rows; superscripts as ^x."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.in_table = False
        self.tags: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.in_table = self.in_table or tag == "table"
        if not self.in_table:
            return
        if tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td"):
            self.rows[-1].append("")
        elif tag in ("sup", "br"):
            self.rows[-1][-1] += "^" if tag == "sup" else " / "

    def handle_endtag(self, tag):
        self.in_table = self.in_table and tag != "table"

    def handle_data(self, data):
        if self.in_table and self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip("\n")


def table_of(results: list[dict], *published: str) -> dict[str, dict[str, str]]:
    """Row -> column -> text, from the HTML."""
    (head, *rows) = Cells(results_table_html(results, published)).rows
    titles = [re.split(r" / |\^", text)[0] for text in head]
    return {row[0]: dict(zip(titles, row, strict=True)) for row in rows if len(row) == len(head)}


def test_rows_are_methods_and_columns_metrics_in_the_papers_order():
    results = [entry("b", "pick_score", 22.674), entry("a", "fid_t", 13.378)]
    results += [entry("b", "fid_t", 17.0), entry("b", "clip", 0.32931)]
    (head, _, *rows) = Cells(results_table_html(results)).rows
    assert [re.split(" / ", text)[0] for text in head] == [
        "method",
        "FID-T ↓",
        "CLIP ↑",
        "PickScore ↑",
    ]
    assert all("N = 5000^a" in text for text in head[1:])
    assert rows == [["b", "17.00", "0.3293", "22.67"], ["a", "13.38", "–", "–"]]


def test_one_way_of_measuring_is_a_footnote_of_the_column():
    results = [entry("a", "fid_t", 13.0, reference="t", settings={"prefix": "A, "})]
    results.append({**results[0], "name": "b", "value": 14.0})
    table = compare(results)
    (head,), (note,) = table.columns, table.notes
    assert head.marks == note.marks == ("a",)
    for words in (
        "N = 5000 images of 5000 prompts",
        "a model",
        "crop",
        SHA[:16],
        "against t",
        'prefix "A, ";',
    ):
        assert words in note.text
    assert "inception.pth" in note.text and "torch 2.15.0" in note.text
    assert all(not value.marks for row in table.sections[0].rows for value in row.cells[0])


@pytest.mark.parametrize(
    "other",
    [
        {"num": 1000},
        {"preprocessing": "no crop"},
        {"model": "another"},
        {"weights": [{"file": "/w/inception.pth", "sha256": "0" * 64}]},
        {"settings": {"ddof": 0}},
        {"versions": {"torch": "2.14.0"}},
        {"reference": "another teacher"},
        {"reference_digest": "0123"},
        {"image_size": "512x512"},
    ],
)
def test_other_ways_of_measuring_are_told_apart(other):
    """In two rows by their marks; in one cell both values are shown."""
    two = [entry("a", "fid_t", 13.0), entry("b", "fid_t", 14.0, **other)]
    rows = table_of(two)
    assert (rows["a"]["FID-T ↓"], rows["b"]["FID-T ↓"]) == ("13.00^a", "14.00^b")
    notes = [note.text for note in compare(two).notes]
    assert len(set(notes)) == 2
    same_cell = [entry("a", "fid_t", 13.0), entry("a", "fid_t", 14.0, **other)]
    assert table_of(same_cell)["a"]["FID-T ↓"] == "13.00^a / 14.00^b"


def test_where_weights_and_reference_lie_does_not_matter():
    other = {"weights": [{"file": "/elsewhere/inception.pth", "sha256": SHA}]}
    here, there = ({"reference": folder, "reference_digest": "0123"} for folder in ("/a", "/b"))
    results = [entry("a", "fid_t", 13.0, **here), entry("b", "fid_t", 14.0, **there, **other)]
    assert table_of(results)["b"]["FID-T ↓"] == "14.00"
    other = {**other, "weights": [{"file": "/w/renamed.pth", "sha256": SHA}]}
    results = [*results, entry("c", "fid_t", 15.0), entry("d", "fid_t", 16.0, **there, **other)]
    marked = [row["FID-T ↓"] for name, row in table_of(results).items() if name in "abcd"]
    assert marked == ["13.00^a", "14.00^a", "15.00^b", "16.00^a"]


def test_two_values_of_one_cell_measured_alike_are_an_error():
    results = [entry("a", "fid_t", 13.0), entry("a", "fid_t", 13.5, images="out/old")]
    with pytest.raises(
        ValueError, match=r"'a' has two values of fid_t .* out/a\) and 13.5 .*out/old"
    ):
        merge(results)
    assert len(merge([results[0], dict(results[0])])) == 1


def test_notes_of_a_result_are_footnotes_of_its_value():
    results = [entry("a", "fid_t", 13.0, notes=["2 images were grey"]), entry("b", "fid_t", 1.0)]
    rows = table_of(results)
    assert (rows["a"]["FID-T ↓"], rows["b"]["FID-T ↓"]) == ("13.00^b", "1.00")
    assert "2 images were grey" in results_table_html(results)


def test_published_rows_are_those_of_the_readme_and_marked():
    """A few numbers by hand; LCM is on no other row, FLUX's teachers on two."""
    rows = table_of([entry("mine", "fid_t", 13.0)], *PUBLISHED)
    published = {name: row for name, row in rows.items() if name != "mine"}
    assert len(published) == 8 + 4 + 7 and all(name.endswith("^†") for name in published)
    hps = "HPSv2 (version not stated) ↑"
    row = published["SenseFlow-SD 3.5, 4 NFE^†"]
    assert (row["FID-T ↓"], row["Patch FID-T ↓"], row["CLIP ↑"]) == ("13.38", "17.48", "0.3286")
    assert (row[hps], row["PickScore ↑"], row["ImageReward ↑"]) == ("0.3016", "23.01", "1.1713")
    teacher = published["FLUX.1 dev, 50 NFE^†"]
    assert list(teacher.values())[1:] == ["–", "–", "0.3202", "0.3000", "23.18", "1.1170"]
    assert published["SDXL, 80 NFE^†"]["ImageReward ↑"] == "0.8719"
    assert published["Hyper-FLUX, 4 NFE^†"]["FID-T ↓"] == "11.24"
    page = results_table_html([entry("mine", "fid_t", 13.0)], PUBLISHED)
    assert page.count('class="published"') == 3 and "published, not measured here" in page
    assert rows["mine"]["Patch FID-T ↓"] == "–"
    assert set(table_of([entry("mine", "fid_t", 13.0)], "flux")) > {"FLUX.1-schnell, 4 NFE^†"}
    assert len(table_of([entry("mine", "fid_t", 13.0)], "flux")) == 8
    assert "†" not in results_table_html([entry("mine", "fid_t", 13.0)])


def test_html_and_markdown_are_escaped(tmp_path):
    bad = '<script>alert("x")</script>|*a*'
    results = [entry(bad, "fid_t", 1.0, model=bad, notes=[bad]), entry("b", bad, 2.0)]
    file = tmp_path / "results.json"
    file.write_text(json.dumps(results))
    assert main(["table", str(file), "--output_dir", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "table.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page
    rows = Cells(page).rows
    assert any(bad in row[0] for row in rows) and "script" not in Cells(page).tags
    text = (tmp_path / "out" / "table.md").read_text()
    assert not re.search(r"(?<!\\)<script", text)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1


def test_the_page_needs_no_other_file(tmp_path):
    (tmp_path / "r.json").write_text(json.dumps([entry("a", "fid_t", 1.0)]))
    assert main(["table", str(tmp_path / "r.json"), "--output_dir", str(tmp_path)]) == 0
    page = (tmp_path / "table.html").read_text()
    assert not re.search(r"https?:|src=|href=|@import|url\(", page)
    assert 'name="viewport"' in page and 'charset="utf-8"' in page
    assert results_table_html([entry("a", "fid_t", 1.0)], PUBLISHED) in page


def test_merging_files_and_merging_again(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([entry("a", "fid_t", 1.0)]))
    (tmp_path / "b.json").write_text(
        json.dumps([entry("a", "clip", 0.3), entry("b", "fid_t", 2.0)])
    )
    files = [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    assert main(["table", *files, "--output_dir", str(tmp_path / "out")]) == 0
    merged = json.loads((tmp_path / "out" / "table.json").read_text())
    assert [(e["name"], e["metric"]) for e in merged] == [
        ("a", "fid_t"),
        ("a", "clip"),
        ("b", "fid_t"),
    ]
    before = (tmp_path / "out" / "table.md").read_text()
    again = [*files, str(tmp_path / "out" / "table.json")]
    assert main(["table", *again, "--output_dir", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "table.md").read_text() == before
    assert json.loads((tmp_path / "out" / "table.json").read_text()) == merged


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not a results file"),
        ("{}", "it holds no list"),
        ("[3]", "entry 0 is no result"),
        ('[{"name": "a", "metric": "clip", "value": 1}]', "entry 0 has no 'num_images'"),
        (
            json.dumps([entry("a", "clip", 1, image_size=[32, 32])]),
            "image_size is [32, 32], not str",
        ),
        (json.dumps([entry("a", "clip", "0.3")]), "value is '0.3', not int"),
        (json.dumps([entry("a", "clip", True)]), "value is True"),
        (json.dumps([entry("a", "clip", float("nan"))]), "value nan is not finite"),
        (json.dumps([entry("a", "clip", 1, weights=["x"])]), "weights must be a list of file"),
    ],
)
def test_wrong_results_files_are_named(text, said, tmp_path, capsys):
    file = tmp_path / "results.json"
    file.write_text(text)
    assert main(["table", str(file), "--output_dir", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert said in error and str(file) in error and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "no results: name files"),
        (["no.json"], "no.json cannot be read"),
        (["--geneval", "a", "no.jsonl"], "no.jsonl cannot be read"),
        (["--t2i_compbench", "a", "no"], "no is not a folder"),
        (["x.json", "--published", "none", "flux"], "--published none excludes"),
    ],
)
def test_wrong_flags(flags, said, tmp_path, capsys):
    assert main(["table", *flags, "--output_dir", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_output_over_a_file(tmp_path, capsys):
    (tmp_path / "r.json").write_text(json.dumps([entry("a", "fid_t", 1.0)]))
    line = ["table", str(tmp_path / "r.json"), "--output_dir", str(tmp_path / "r.json")]
    assert main(line) == 2
    assert "r.json is a file" in capsys.readouterr().err


def test_benchmarks_stand_in_the_table(tmp_path):
    """Through the command: --geneval and --t2i_compbench beside a results file."""
    tasks = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
    rows = [{"tag": t, "correct": t == "colors", "metadata": "x"} for t in tasks]
    (tmp_path / "g.jsonl").write_text("\n".join(map(json.dumps, rows)))
    scores = tmp_path / "t2i" / "texture" / "annotation_blip"
    scores.mkdir(parents=True)
    (scores / "vqa_result.json").write_text('[{"question_id": 0, "answer": "0.6250"}]')
    (tmp_path / "r.json").write_text(json.dumps([entry("s", "fid_t", 1.0)]))
    line = ["table", tmp_path / "r.json", "--geneval", "s", tmp_path / "g.jsonl"]
    line += ["--t2i_compbench", "s", tmp_path / "t2i", "--published", "none"]
    assert main([*map(str, line), "--output_dir", str(tmp_path / "out")]) == 0
    (head, _, row) = Cells((tmp_path / "out" / "table.html").read_text()).rows
    titles = [re.split(r" / |\^", text)[0] for text in head]
    values = dict(zip(titles, row, strict=True))
    assert values["GenEval ↑"] == "0.1667" and values["GenEval colors ↑"] == "1.0000"
    assert values["T2I-CompBench texture ↑"] == "0.6250" and values["FID-T ↓"] == "1.00"


def test_missing_keys_are_empty():
    short = {"name": "a", "metric": "clip", "value": 0.3, "num_images": 5}
    whole = check_result(short, "here")
    assert whole["weights"] == [] and whole["model"] is None and whole["settings"] == {}
    assert table_of([short])["a"]["CLIP ↑"] == "0.3000"
    with pytest.raises(ValueError, match="result 0 has no 'value'"):
        results_table_html([{"name": "a", "metric": "clip"}])


def test_roundings_of_two_machines_are_one_value():
    one = check_result(entry("s", "clip", 0.3123456), "a")
    assert len(merge([one, {**one, "value": one["value"] * (1 + 1e-7)}])) == 1
    with pytest.raises(ValueError, match="two values of clip"):
        merge([one, {**one, "value": one["value"] * 1.001}])
