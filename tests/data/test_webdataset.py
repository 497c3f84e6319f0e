"""WebDataset shards: extraction, damage, going on, and the memory it takes."""

import io
import json
import tarfile
import tracemalloc
from pathlib import Path

import pytest
from PIL import Image
from small_disk import grow, small_disk

from senseflow.data.make import __main__ as make
from senseflow.data.make.captioned import Columns
from senseflow.data.make.webdataset import expand, from_shards

ANY = Columns()


def encoded(colour: str, form: str = "PNG", size: int = 8) -> bytes:
    with io.BytesIO() as stream:
        Image.new("RGB", (size, size), colour).save(stream, form)
        return stream.getvalue()


def shard(file: Path, members: list[tuple[str, bytes]], mode: str = "w") -> Path:
    with tarfile.open(file, mode) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file


def sample(key: str, caption: str, colour: str = "red") -> list[tuple[str, bytes]]:
    return [(f"{key}.jpg", encoded(colour, "JPEG")), (f"{key}.txt", caption.encode())]


def captions(extracted) -> dict[str, str]:
    found, _ = extracted
    return {pair.key: pair.caption for pair in found.pairs}


def test_braces_stand_for_what_the_shell_makes_of_them():
    assert [str(f) for f in expand(["a-{098..101}.tar", "b.tar"])] == [
        "a-098.tar", "a-099.tar", "a-100.tar", "a-101.tar", "b.tar",
    ]  # fmt: skip
    assert len(expand(["{0..1}/s-{00..10}.tar"])) == 22
    for word in ("s-{0000000..1000000}.tar", "{0..999}/{0..1000}", "{0..99}{0..99}{0..100}"):
        with pytest.raises(ValueError, match=r"stands for [0-9,]{9,} files, more than 1,000,000"):
            expand([word])


def test_a_name_ends_at_its_first_dot_and_none_is_lost(tmp_path, capsys):
    """As webdataset pairs them: `photo.00001.jpg` is the file 00001.jpg of the sample photo."""
    many = [m for k in range(150) for m in sample(f"photo.{k:05d}", "a cat")]
    shard(tmp_path / "s.tar", [*sample("good", "a dog"), *many])
    words = [str(tmp_path / "s.tar"), "--output", str(tmp_path / "d.json")]
    assert make.main(words) == 2 and not (tmp_path / "d.json").exists()
    said = capsys.readouterr().err.splitlines()[-1]
    assert "300 left out (300 x a name with a dot before its suffix)" in said and len(said) < 500
    assert "name ends at its first dot: rename the files, or extract the shard" in said
    listed = (tmp_path / "d.left_out.tsv").read_text().splitlines()
    assert len(listed) == 300 and listed[0].startswith("photo.00000.jpg\t")
    assert make.main([*words, "--max_left_out", "300"]) == 0
    assert json.loads((tmp_path / "d.json").read_text())["keys"] == ["s/good"]


def test_the_further_files_of_a_whole_sample_are_counted(tmp_path):
    members = [
        *sample("0", "a"),
        ("0.mask.png", encoded("red")),
        ("0.seg.PNG", b""),
        ("0.cls", b""),
    ]
    found, _ = from_shards([shard(tmp_path / "s.tar", members)], tmp_path / "images", ANY)
    assert captions((found, [])) == {"s/0": "a"} and not found.left_out
    assert found.passed_over == {"further files of a sample": 2, ".cls": 1}
    members = [("1.jpg", encoded("red", "JPEG")), ("1.blip.txt", b"the caption, it may be")]
    found, _ = from_shards([shard(tmp_path / "t.tar", members)], tmp_path / "images", ANY)
    assert found.left_out == [
        ("1.blip.txt", "a name with a dot before its suffix"),
        ("t/1", "an image without a caption"),
    ]


def test_what_stands_twice_or_is_no_file_is_left_out(tmp_path):
    file = shard(tmp_path / "s.tar", [*sample("0", "first"), *sample("0", "in it")])
    with tarfile.open(file, "a") as tar:
        for name, kind, size in (
            ("1.jpg", tarfile.LNKTYPE, 0), ("1.txt", tarfile.SYMTYPE, 0), ("2.png", b"S", 2**40),
        ):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "0.jpg"
            if size:  # a sparse file of a terabyte, none of it stored
                info.type, info.pax_headers = tarfile.REGTYPE, {
                    "GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.name": name,
                    "GNU.sparse.size": str(size), "GNU.sparse.map": f"{size},0",
                }  # fmt: skip
            tar.addfile(info)
        for name, data in [*sample("3", "three"), *sample("0", "again")]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    found, damaged = from_shards([file], tmp_path / "images", ANY)
    assert captions((found, damaged)) == {"s/0": "first", "s/3": "three"} and not damaged
    assert found.left_out == [
        ("0.jpg", "a name that stands before in the shard"),
        ("0.txt", "a name that stands before in the shard"),
        ("1.jpg", "a link or a device in the place of a file"),
        ("1.txt", "a link or a device in the place of a file"),
        ("2.png", "a file of more than 256 MiB"),
        ("s/0", "a name that stands before in the shard"),
    ]


def test_kinds_of_files_are_said_in_few_words(tmp_path, capsys, caplog):
    caplog.set_level("INFO")
    members = [(f"{k}.part{k:04d}", b"") for k in range(500)] + sample("a", "a cat")
    shard(tmp_path / "s.tar", members)
    assert make.main([str(tmp_path / "s.tar"), "--output", str(tmp_path / "d.json")]) == 0
    assert ", 492 of 492 more kinds" in caplog.text
    assert "1 images with captions (1 .jpg)" in caplog.text and len(caplog.text) < 1000


def test_folders_of_something_else_are_left_alone(tmp_path, capsys):
    shard(tmp_path / "s.tar", sample("0", "zero"))
    theirs = tmp_path / "images" / "s" / "000000.jpg"
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(b"their own")
    assert make.main([str(tmp_path / "s.tar"), "--output", str(tmp_path / "d.json")]) == 2
    assert "did not write: name another folder with --images" in capsys.readouterr().err
    assert theirs.read_bytes() == b"their own" and not (tmp_path / "images" / "s.json").exists()
    (tmp_path / "images" / "s.json").write_text("[" * 5000)
    assert make.main([str(tmp_path / "s.tar"), "--output", str(tmp_path / "d.json")]) == 2
    assert "s.json is no note of a shard, or damaged" in capsys.readouterr().err
    assert theirs.read_bytes() == b"their own"


def test_a_full_disk_names_the_image_and_the_same_command_goes_on(tmp_path, capsys):
    shard(tmp_path / "s.tar", [m for k in range(9) for m in (
        (f"{k}.bmp", encoded("red", "BMP", 64)), (f"{k}.txt", b"a cat"))])  # fmt: skip
    with small_disk(tmp_path / "disk", "48k") as disk:
        words = [str(tmp_path / "s.tar"), "--output", str(disk / "d.json")]
        assert make.main(words) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert "No space left on device: " in said and "disk/images/s/00000" in said
        grow(disk, "1m")
        assert make.main(words) == 0
        assert len(json.loads((disk / "d.json").read_text())["keys"]) == 9


def test_samples_with_text_or_json_in_any_order(tmp_path):
    members = [
        ("./a/001.txt", b"of the text"),
        ("./a/001.JPG", encoded("red", "JPEG")),
        ("./a/001.json", b'{"caption": "of the json"}'),
        ("002.json", b'{"caption": "caf\\u00e9", "width": 8}'),
        ("002.webp", encoded("blue", "WEBP")),
        ("003.png", encoded("red")),
        ("004.txt", b"alone"),
        ("005.png", encoded("red")),
        ("005.json", b"{"),
        ("._006.png", b"hidden"),
        ("007.cls", b"3"),
        ("../../etc/008.png", encoded("lime")),
        ("../../etc/008.txt", b"outside"),
    ]
    extracted = from_shards([shard(tmp_path / "s.tar", members)], tmp_path / "images", ANY)
    assert captions(extracted) == {
        "s/a/001": "of the text",
        "s/002": "café",
        "s/../../etc/008": "outside",
    }
    assert [why for _, why in extracted[0].left_out] == [
        "an image without a caption", "a caption without an image", "a caption that is not text",
    ]  # fmt: skip
    assert +extracted[0].passed_over == {"hidden": 1, ".cls": 1} and not extracted[1]
    files = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file())
    assert files == [
        "images/s.json",
        "images/s/000000.jpg",
        "images/s/000001.webp",
        "images/s/000005.png",
        "s.tar",
    ]
    last = next(pair for pair in extracted[0].pairs if pair.caption == "outside")
    assert Image.open(last.image).getpixel((0, 0)) == (0, 255, 0)


def test_the_json_column_that_is_named_goes_before_the_text(tmp_path):
    members = [*sample("0", "of the text"), ("0.json", b'{"blip": "of blip"}')]
    file = shard(tmp_path / "s.tar", members)
    extracted = from_shards([file], tmp_path / "images", Columns(None, "blip"))
    assert captions(extracted) == {"s/0": "of blip"}


@pytest.mark.parametrize("cut", ["inside a file", "between files", "header"])
def test_damaged_shards_are_said_and_give_what_stands_before(tmp_path, capsys, caplog, cut):
    whole = shard(tmp_path / "s-0.tar", sample("0", "whole"))
    file = shard(tmp_path / "s-1.tar", [*sample("0", "before"), *sample("1", "after")])
    data = file.read_bytes()
    with tarfile.open(file) as tar:
        third = tar.getmembers()[2]
    ends = {"inside a file": third.offset_data + 99, "between files": third.offset}
    if cut == "header":
        file.write_bytes(data[: third.offset] + b"?" * (len(data) - third.offset))
    else:
        file.write_bytes(data[: ends[cut]])
    output = tmp_path / "data.json"
    words = [str(tmp_path / "s-{0..1}.tar"), "--output", str(output)]
    assert make.main(words) == 2 and not output.exists()
    assert "1 of 2 shards are damaged" in capsys.readouterr().err
    assert (tmp_path / "images" / "s-0.json").exists()
    assert make.main([*words, "--max_damaged", "1"]) == 0
    assert json.loads(output.read_text())["prompts"] == ["whole", "before"]
    assert f"{file}\tdamaged: " in output.with_suffix(".left_out.tsv").read_text()
    assert "pairs" not in (tmp_path / "images" / "s-1.json").read_text() and whole.exists()
    file.write_bytes(data)  # fetched again
    assert make.main(words) == 0
    assert json.loads(output.read_text())["prompts"] == ["whole", "before", "after"]


def test_compressed_shards_and_one_cut_short(tmp_path):
    file = shard(tmp_path / "s.tar.gz", sample("0", "packed"), "w:gz")
    assert captions(from_shards([file], tmp_path / "a", ANY)) == {"s/0": "packed"}
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert len(from_shards([file], tmp_path / "b", ANY)[1]) == 1


def test_finished_shards_are_not_read_again_but_changed_ones_are(tmp_path, monkeypatch):
    files = [shard(tmp_path / f"{i}.tar", sample("0", f"caption {i}")) for i in range(3)]
    with monkeypatch.context() as patch:
        real = tarfile.open

        def stopped(name, mode):
            if Path(name).name == "2.tar":
                raise KeyboardInterrupt
            return real(name, mode)

        patch.setattr(tarfile, "open", stopped)
        with pytest.raises(KeyboardInterrupt):
            from_shards(files, tmp_path / "images", ANY)
    first = tmp_path / "images" / "0" / "000000.jpg"
    first.write_bytes(b"would be replaced if it were read again")
    assert list(captions(from_shards(files, tmp_path / "images", ANY)).values()) == [
        "caption 0", "caption 1", "caption 2",
    ]  # fmt: skip
    assert first.read_bytes().startswith(b"would")
    shard(files[0], sample("0", "another caption"))
    assert captions(from_shards(files, tmp_path / "images", ANY))["0/0"] == "another caption"
    assert Image.open(first).size == (8, 8)


def test_shards_of_one_name_are_refused(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shard(tmp_path / name / "0.tar", sample("0", name))
    words = [str(tmp_path / name / "0.tar") for name in ("a", "b")]
    assert make.main([*words, "--output", str(tmp_path / "d.json")]) == 2
    assert "two shards are named 0" in capsys.readouterr().err


def test_a_tar_of_a_folder_in_no_order_is_told_how_to_make_it(tmp_path, capsys):
    """What `tar cf` writes where the file system lists captions and images apart."""
    (image, text), (other, words) = sample("0", "zero"), sample("1", "one")
    shard(tmp_path / "0.tar", [image, other, text, words])
    assert make.main([str(tmp_path / "0.tar"), "--output", str(tmp_path / "d.json")]) == 2
    assert "tar --sort=name" in capsys.readouterr().err
    assert not (tmp_path / "d.json").exists()


def test_a_list_never_takes_the_place_of_a_shards_note(tmp_path, capsys):
    shard(tmp_path / "0.tar", sample("0", "zero"))
    words = [str(tmp_path / "0.tar"), "--images", str(tmp_path), "--output"]
    assert make.main([*words, str(tmp_path / "0.json")]) == 2
    assert "where the note of the shard 0 is kept" in capsys.readouterr().err
    for _ in range(2):  # the second time from the note
        assert make.main([*words, str(tmp_path / "d.json")]) == 0


def test_memory_is_that_of_a_sample(tmp_path):
    """A shard of 12 MB in 3,000 files: the peak stays under 1.5 MB."""
    members = [m for i in range(1500) for m in ((f"{i}.jpg", bytes(8000)), (f"{i}.txt", b"c"))]
    file = shard(tmp_path / "s.tar", members)
    tracemalloc.start()
    extracted = from_shards([file], tmp_path / "images", ANY)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(extracted[0].pairs) == 1500 and peak < 1.5e6, peak
