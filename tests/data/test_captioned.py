"""Data sets as users keep them: what becomes a pair, and that nothing else goes missing."""

import csv
import json
import os
import re
import unicodedata
from pathlib import Path

import pytest
import torch
from PIL import Image

from senseflow.data.image_lists import read_lists
from senseflow.data.items import Position, UnreadableImagesError
from senseflow.data.json_images import JsonImages
from senseflow.data.make import __main__ as make
from senseflow.data.make.captioned import Columns, from_folder, from_table
from senseflow.tiny.pictures import write_dataset

ANY = Columns()


def picture(file: Path, colour: str = "red") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(file)
    return file


def captions(found) -> dict[str, str]:
    return {pair.key: pair.caption for pair in found.pairs}


def test_sidecars_in_folders_below_with_odd_names(tmp_path):
    decomposed = unicodedata.normalize("NFD", "café")
    for name, sidecar in (
        ("a.jpg", "a.txt"),
        ("sub/deep/B.PNG", "sub/deep/B.TXT"),
        ("c.webp", "c.caption"),
        ("d.png", "d.png.txt"),
        (f"{decomposed}.jpg", f"{unicodedata.normalize('NFC', decomposed)}.txt"),
        ("v1.5.png", "v1.5.txt"),
    ):
        picture(tmp_path / name)
        (tmp_path / sidecar).write_text(f"  of {sidecar[0]}\n second line \n", encoding="utf-8-sig")
    found = from_folder(tmp_path, ANY)
    assert captions(found) == {
        "a.jpg": "of a second line",
        "sub/deep/B.PNG": "of s second line",
        "c.webp": "of c second line",
        "d.png": "of d second line",
        f"{decomposed}.jpg": "of c second line",
        "v1.5.png": "of v second line",
    }
    assert not found.left_out and not found.passed_over


def test_a_txt_goes_before_a_caption_file_and_neither_is_missed(tmp_path):
    picture(tmp_path / "a.jpg")
    (tmp_path / "a.caption").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    found = from_folder(tmp_path, ANY)
    assert captions(found) == {"a.jpg": "first"} and not found.left_out


def test_what_is_left_out_is_named_and_what_is_passed_over_is_counted(tmp_path):
    for name in ("none.png", "empty.png", "latin.png", "good.png"):
        picture(tmp_path / name)
    (tmp_path / "empty.txt").write_text(" \n\t")
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "alone.txt").write_text("no image")
    picture(tmp_path / ".hidden" / "x.png")
    (tmp_path / "._good.png").write_bytes(b"a Mac left this")
    (tmp_path / "notes.md").write_text("")
    (tmp_path / "elsewhere").symlink_to(tmp_path / ".hidden")
    found = from_folder(tmp_path, ANY)
    assert captions(found) == {"good.png": "good"}
    assert dict(found.left_out) == {
        "none.png": "an image without a caption",
        "empty.png": "an empty caption",
        "latin.png": "a caption that is not text",
        "alone.txt": "a caption without an image",
    }
    assert found.passed_over == {"hidden": 2, "linked folders": 1, ".md": 1}


@pytest.mark.parametrize("suffix", [".jfif", ".gif", ".avif", ".JPE"])
def test_images_of_less_usual_kinds_are_read(tmp_path, caplog, suffix):
    """In a folder with sidecars, and named by a metadata.jsonl."""
    caplog.set_level("INFO")
    for folder in ("sidecar", "table"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (40, 40), "blue").save(tmp_path / folder / f"a{suffix}")
    (tmp_path / "sidecar" / "a.txt").write_text("a cat")
    row = {"file_name": f"a{suffix}", "text": "a cat"}
    (tmp_path / "table" / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    for folder in ("sidecar", "table"):
        file = tmp_path / f"{folder}.json"
        assert make.main([str(tmp_path / folder), "--output", str(file)]) == 0
        item = JsonImages(file, (8, 8))[at(0)]
        assert item.prompt == "a cat" and item.image[2].min() > 0.9
        assert f"1 images with captions (1 {suffix.lower()})" in caplog.text


def test_images_that_pillow_does_not_read_are_named(tmp_path, capsys, monkeypatch):
    monkeypatch.delitem(Image.registered_extensions(), ".heic", raising=False)
    for name in ("a.heic", "b.jxl"):
        (tmp_path / name).write_bytes(b"....ftypheic")
        (tmp_path / name).with_suffix(".txt").write_text("a cat")
    assert make.main([str(tmp_path), "--output", str(tmp_path / "o" / "d.json")]) == 2
    said = capsys.readouterr().err
    assert "1 x a .heic image, which Pillow does not read here (pip install pillow-heif)" in said
    assert "1 x a .jxl image, which Pillow does not read here (write it as .png or .jpg)" in said
    tree = {"keys": ["0"], "image_paths": ["a.heic"], "prompts": ["a cat"]}
    (tmp_path / "d.json").write_text(json.dumps(tree))
    with pytest.raises(UnreadableImagesError, match=r"a .heic image, .* pillow-heif\): .*a.heic"):
        JsonImages(tmp_path / "d.json", (8, 8))[at(0)]


def test_what_a_metadata_row_names_is_an_image_whatever_its_kind(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.ppm")
    picture(tmp_path / "b.PNG")
    picture(tmp_path / "b.png", "blue")
    rows = [("a.ppm", "a"), ("b.png", "small"), ("b.PNG", "large"), (".", "none"), ("x" * 999, "")]
    lines = [json.dumps({"file_name": n, "text": t}) + "\n" for n, t in rows]
    (tmp_path / "metadata.jsonl").write_text("".join(lines))
    found = from_folder(tmp_path, ANY)
    assert captions(found) == {"a.ppm": "a", "b.PNG": "large", "b.png": "small"}
    assert len(found.left_out) == 2 and not +found.passed_over


def test_pipes_and_broken_links_are_counted_and_nothing_waits_for_them(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a")
    for name in ("b.png", "c.txt", "metadata.csv"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "d.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "e.png").symlink_to("a.png")
    found = from_folder(tmp_path, ANY)
    assert captions(found) == {"a.png": "a"}
    assert found.left_out == [("e.png", "an image without a caption")]
    assert found.passed_over == {"pipes, devices and broken links": 4}


def test_half_of_an_emoji_is_no_caption_and_a_whole_one_is(tmp_path):
    picture(tmp_path / "a.png")
    table = tmp_path / "t.jsonl"
    texts = [r"cat \ud83d", r"cat \ud83d\ude00", r"a\u0000b"]
    table.write_text("".join(f'{{"file_name": "a.png", "text": "{t}"}}\n' for t in texts))
    found = from_table(table, ANY)
    assert [pair.caption for pair in found.pairs] == ["cat \U0001f600", "a\0b"]
    assert found.left_out == [("a.png", "a caption with half of a character, as of an emoji cut "
                               "in two")]  # fmt: skip


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv"])
def test_metadata_of_imagefolder_goes_before_sidecars(tmp_path, suffix):
    """Cells with commas, quotes and line ends; two captions of one image; a row without image."""
    rows = [
        ("a.png", 'red, "so red"\nindeed'),
        ("sub/b.png", "b"),
        ("a.png", "again"),
        ("x.png", "x"),
    ]
    for name in ("a.png", "sub/b.png", "c.png"):
        picture(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text("of the sidecar")
    with (tmp_path / f"metadata{suffix}").open("w", newline="") as stream:
        if suffix == ".jsonl":
            stream.writelines(json.dumps({"file_name": n, "text": t}) + "\n" for n, t in rows)
        else:
            writer = csv.writer(stream, delimiter="," if suffix == ".csv" else "\t")
            writer.writerows([("file_name", "text"), *rows])
    found = from_folder(tmp_path, ANY)
    assert captions(found) == {
        "a.png": 'red, "so red" indeed',
        "a.png#2": "again",
        "sub/b.png": "b",
        "c.png": "of the sidecar",
    }
    assert [why for _, why in found.left_out] == ["a caption without an image"]


def test_metadata_in_a_folder_below_is_relative_to_it(tmp_path):
    picture(tmp_path / "train" / "a.png")
    (tmp_path / "train" / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "t"}\n')
    assert captions(from_folder(tmp_path, ANY)) == {"train/a.png": "t"}


def test_a_table_alone_with_columns_of_its_own(tmp_path):
    picture(tmp_path / "pictures" / "a.png")
    table = tmp_path / "t.csv"
    table.write_text(
        "where,blip,text\npictures/a.png,short,long\ngone.png,x,y\npictures/a.png,,z\n"
    )
    found = from_table(table, Columns("where", "blip"))
    assert captions(found) == {"pictures/a.png": "short"}
    assert [why for _, why in found.left_out] == ["a caption without an image", "an empty caption"]
    with pytest.raises(ValueError, match=r"t\.csv, line 2.*--file_column"):
        from_table(table, ANY)
    table.with_suffix(".jsonl").write_text('{"path": "a"}\n{"path": \n')
    with pytest.raises(ValueError, match=r"t\.jsonl, line 2"):
        from_table(table.with_suffix(".jsonl"), ANY)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", "File_Name;TEXT\na.png;so; red\n"),
        ("t.tsv", "Image\tCaption\na.png\tso; red\n"),
        ("t.json", '[{"PATH": "a.png", "Prompt": "so; red"}]'),
        ("t.JSONL", '{"file_name": "a.png", "text": null, "caption": "so; red"}'),
        ("t.json", '{"a.png": "so; red"}'),
    ],
)
def test_tables_are_read_as_those_of_prompts_are(name, text, tmp_path):
    picture(tmp_path / "a.png")
    text = text.replace("so; red", '"so; red"') if ";TEXT" in text else text
    (tmp_path / name).write_text(text, encoding="utf-16")
    assert captions(from_table(tmp_path / name, ANY)) == {"a.png": "so; red"}


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("t.csv", "file_name,text\na.png,so, red\n", "line 2 has 3 cells, its table 2 columns"),
        ("t.csv", "file_name,text,Text\na.png,a,b\n", "columns 'text' and 'Text'"),
        ("t.jsonl", '{"file_name": "a.png", "text": "a"}\n"b"\n', "line 2 is str, not a row"),
        ("t.json", "a.png: so red", "t.json is not valid JSON"),
        ("t.csv", "<html>", "is a page"),
    ],
)
def test_a_table_that_would_lose_a_caption_is_refused(name, text, said, tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=said):
        from_table(tmp_path / name, ANY)


def test_the_embedded_pictures_with_sidecars_give_their_own_list(tmp_path):
    write_dataset(tmp_path, 5, seed=0, num_prompts=1, sidecars=True)
    assert make.main([str(tmp_path / "images"), "--output", str(tmp_path / "mine.json")]) == 0
    _, *mine = read_lists(tmp_path / "mine.json")
    _, *theirs = read_lists(tmp_path / "data.json")
    assert mine == theirs


def at(item: int) -> Position:
    return Position(1, 0, item)


def test_the_json_is_read_by_the_trainers_from_another_folder(tmp_path, caplog):
    picture(tmp_path / "pictures" / "a.png", "red")
    picture(tmp_path / "pictures" / "b.png", "blue")
    for name in "ab":
        (tmp_path / "pictures" / f"{name}.txt").write_text(f"picture {name}")
    file = tmp_path / "lists" / "data.json"
    assert make.main([str(tmp_path / "pictures"), "--output", str(file)]) == 0
    assert json.loads(file.read_text())["image_paths"] == ["../pictures/a.png", "../pictures/b.png"]
    data = JsonImages(file, (8, 8))
    assert [data[at(i)].prompt for i in range(2)] == ["picture a", "picture b"]
    assert torch.equal(data[at(1)].image[:, 0, 0], torch.tensor([-1.0, -1.0, 1.0]))
    (tmp_path / "pictures" / "b.txt").unlink()
    assert make.main([str(tmp_path / "pictures"), "--output", str(file)]) == 0
    listed = file.with_suffix(".left_out.tsv")
    assert listed.read_text() == "b.png\tan image without a caption\n"
    (tmp_path / "pictures" / "b.txt").write_text("back")
    assert make.main([str(tmp_path / "pictures"), "--output", str(file)]) == 0
    assert not listed.exists() and len(JsonImages(file, (8, 8))) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "does not exist"),
        (["a.png"], "type .png"),
        (["https://x.org/{0..3}.tar"], "download it first"),
        (["s-{3..1}.tar"], "3 is above 1"),
        (["s-{0..1}.tar"], "2 of 2 shards are not there, such as s-0.tar"),
        (["one", "two"], "2 sources"),
        (["full", "--max_left_out", "1"], "listed in .*--max_left_out allows 1"),
        (["empty"], r"no image with a caption in empty \(expected a folder"),
        ([""], "SOURCE is empty"),
        (["bare"], r"listed in .*; a caption is x.txt beside x.jpg, or in .* text or caption"),
        (["a.csv", "--caption_column", "blip"], r"column blip \(--caption_column\)"),
        (["full", "--output", "a.png/x/data.json"], "a.png/x is under .*a.png, which is a file"),
        (["full", "--images", "x"], "--images is of shards"),
        (["full", "--output", "other.json"], "no data set, left as it is"),
        (["full", "--output", "folder"], "ends in .json"),
        (["s-{0000000..1000000}.tar"], "stands for 1,000,001 files"),
        (["/dev/null"], "is a pipe or a device"),
        (["deep.jsonl"], "deep.jsonl is not valid JSON: it is nested too deeply"),
        (["other"], "a table of captions is called metadata.csv, or named itself as SOURCE"),
    ],
)
def test_mistakes_are_said_in_one_line_and_nothing_is_written(
    tmp_path, monkeypatch, capsys, words, message
):
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "a.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "other.json").write_text('{"mine": 1}')
    picture(tmp_path / "bare" / "a.png")
    (tmp_path / "a.csv").write_text("file_name,text\na.png,a\n")
    (tmp_path / "deep.jsonl").write_text("[" * 5000)
    picture(tmp_path / "other" / "a.png").with_name("captions.csv").write_text("a")
    for name in "ab":
        picture(tmp_path / "full" / f"{name}.png")
    picture(tmp_path / "full" / "c.png").with_suffix(".txt").write_text("c")
    assert make.main([*words, *([] if "--output" in words else ["--output", "data.json"])]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and not (tmp_path / "data.json").exists()
    assert re.search(message, said), said
    assert (tmp_path / "other.json").read_text() == '{"mine": 1}'
