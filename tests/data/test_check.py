"""The check of a data set: each fault is found, a clean set is clean, and the statuses say so."""

import io
import itertools
import json
import re
import time
from dataclasses import replace
from pathlib import Path

import lmdb
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageEnhance
from scipy.fft import dctn
from sklearn.datasets import load_sample_images
from statuses import status_of

from senseflow.config.config import load_config
from senseflow.config.recipes import RECIPES
from senseflow.data.check import __main__ as check
from senseflow.data.check import pictures
from senseflow.data.check.duplicates import BITS, LEVELS, exact_groups, near_groups
from senseflow.data.check.findings import plain, share
from senseflow.data.check.images import cut_away, enlargement
from senseflow.data.check.looking import Look, look_at, look_at_all, perceptual_hash
from senseflow.data.check.wording import caption_findings, read_tokenizers
from senseflow.data.convert.latents_writer import Chunk, LatentsWriter
from senseflow.data.items import Position, UnreadableImagesError
from senseflow.data.make import __main__ as make
from senseflow.data.make.captioned import Columns, from_folder
from senseflow.engine.inputs import read_run

TEACHER = Path("assets/tiny/flux/pipeline")
TINY = "configs/FLUX/flux_senseflow_tiny.yaml"


def scene(seed: int, size: tuple[int, int] = (96, 96)) -> Image.Image:
    """A smooth random picture."""
    levels = np.random.default_rng(seed).integers(0, 255, (7, 7, 3), dtype=np.uint8)
    return Image.fromarray(levels).resize(size, Image.Resampling.BICUBIC)


def data_set(folder: Path, files: dict[str, Image.Image | bytes], **captions: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in files.items():
        if isinstance(picture, bytes):
            (folder / name).write_bytes(picture)
        else:
            picture.save(folder / name)
    prompts = [captions.get(Path(name).stem, f"picture {name}") for name in files]
    tree = {"keys": list(files), "image_paths": list(files), "prompts": prompts}
    (folder / "data.json").write_text(json.dumps(tree))
    return folder / "data.json"


def checked(file: Path, output: Path, *words: str) -> tuple[int, dict]:
    """The exit status and check.json."""
    status = check.main([str(file), "--output", str(output), "--workers", "1", *words])
    return status, json.loads((output / "check.json").read_text())


def found(tree: dict) -> dict[str, dict]:
    return {finding["name"]: finding for finding in tree["findings"]}


def test_a_clean_set_is_clean(tmp_path):
    file = data_set(tmp_path, {f"{i}.png": scene(i, (40, 40)) for i in range(6)})
    status, tree = checked(file, tmp_path / "out", "--resolution", "32")
    assert status == 0 and not tree["findings"] and tree["num"] == 6
    assert tree["images"]["short_side"]["median"] == 40
    for name in ("numbers.png", "suspicious.png"):
        assert Image.open(tmp_path / "out" / name).width > 900


def test_every_fault_is_found_and_named(tmp_path, caplog):
    whole = scene(0)
    with io.BytesIO() as stream:
        whole.save(stream, "JPEG")
        jpeg = stream.getvalue()
    exif = Image.Exif()
    exif[0x0112] = 6
    files: dict[str, Image.Image | bytes] = {f"{i}.png": scene(i) for i in range(4)}
    files |= {
        "cut.jpg": jpeg[: len(jpeg) // 2],
        "text.png": b"no image",
        "same.bmp": whole,
        "again.jpg": jpeg,
        "small.png": scene(10, (24, 40)),
        "wide.png": scene(11, (300, 60)),
        "flat.png": Image.new("RGB", (64, 64), (90, 90, 92)),
        "cmyk.jpg": scene(12).convert("CMYK"),
    }
    file = data_set(
        tmp_path, files, again=" ".join(["word"] * 100), small="picture 0.png", wide=" "
    )
    scene(13).save(tmp_path / "turned.jpg", exif=exif)
    frames = [scene(14), scene(15)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    tree = json.loads(file.read_text())
    for name in ("turned.jpg", "moving.gif", "0.png"):
        for column in tree.values():
            column.append(name)
    file.write_text(json.dumps(tree))

    status, said = checked(file, tmp_path / "out", "--config", TINY, "train.resolution=48")
    findings = found(said)
    assert status == 0 and not said["stops"]
    assert findings["unreadable"]["samples"] == ["cut.jpg", "text.png"]
    assert "truncated" in findings["unreadable"]["reasons"][0]
    assert findings["small"]["samples"] == ["small.png"] and "2 x" in findings["small"]["reasons"]
    assert findings["cut"]["samples"] == ["wide.png"]
    assert findings["flat"]["samples"] == ["flat.png"]
    assert findings["duplicates"]["samples"] == [["0.png", "same.bmp"]]
    assert findings["near duplicates"]["samples"] == [["0.png", "again.jpg"]]
    assert findings["listed again"]["samples"] == ["0.png"]
    assert findings["turned"]["samples"] == ["turned.jpg"]
    assert findings["animated"]["samples"] == ["moving.gif"]
    assert set(findings["converted"]["samples"]) == {"cmyk.jpg", "moving.gif"}
    assert findings["empty captions"]["samples"] == ["wide.png"]
    assert findings["long captions, tokenizer_2"]["samples"][0] == "again.jpg"
    assert findings["repeated captions"]["words"].startswith("2 of 15")
    assert "nothing would stop a run" in caplog.text and "cut.jpg" in caplog.text


def test_more_unreadable_than_allowed_stops_the_run(tmp_path, caplog):
    files = {"a.png": scene(0), "b.png": b"", "c.png": b""}
    file = data_set(tmp_path, files)
    for allowed, expected in ((1, 1), (2, 0)):
        words = ("--config", TINY, f"data.max_unreadable={allowed}")
        status, tree = checked(file, tmp_path / "out", *words)
        assert (status, tree["stops"]) == (expected, bool(expected))
    data_set(tmp_path, {"b.png": b""})
    assert checked(file, tmp_path / "out", "--resolution", "32")[0] == 1  # all of them
    assert "STOPS THE RUN" in caplog.text


@pytest.mark.parametrize("override", ["train.resolution=33", "data.max_sequence_length=9999"])
def test_what_the_trainer_refuses_stops_the_run_in_its_own_words(tmp_path, override):
    file = data_set(tmp_path, {f"{i}.png": scene(i) for i in range(3)})
    status, tree = checked(file, tmp_path / "out", TINY, override)
    config = load_config(TINY, [override, f"paths.dataset={file}"])
    with pytest.raises(ValueError) as refused:
        read_run(config, RECIPES[config.recipe].family)
    assert status == 1 and found(tree)["does not fit"]["words"] == str(refused.value)


def test_captions_that_no_tokenizer_takes_are_passed_over_as_in_a_run(tmp_path, caplog):
    files = {f"{i}.png": scene(i) for i in range(4)}
    file = data_set(tmp_path, files, **{"1": "a cat \ud83d", "2": "a\0b", "3": "\u202ecat"})
    for allowed, expected in ((1, 0), (0, 1)):
        words = (TINY, f"data.max_unreadable={allowed}")
        status, tree = checked(file, tmp_path / "out", *words)
        unread = found(tree)["unreadable"]
        assert (status, unread["samples"]) == (expected, ["1.png"])
        assert "half of a character" in unread["reasons"][0]
        assert "empty captions" not in found(tree)
    config = load_config(TINY, ["data.max_unreadable=0", f"paths.dataset={file}"])
    with pytest.raises(UnreadableImagesError):  # as training: check and run agree
        read_run(config, RECIPES[config.recipe].family).data[Position(1, 0, 1)]


def test_what_a_check_writes_beside_its_pictures_is_no_data(tmp_path):
    scene(0).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a")
    words = [str(tmp_path), "--output", str(tmp_path / "d.json")]
    assert make.main(words) == 0
    assert check.main([words[2], "--resolution", "8", "--workers", "1"]) == 0
    assert (tmp_path / "d.check" / "numbers.png").is_file()
    found = from_folder(tmp_path, Columns())
    assert len(found.pairs) == 1 and not found.left_out
    assert found.passed_over["folders of a check"] == 1


def test_files_are_named_as_they_can_be_opened_and_listed_as_the_data_set_has_them(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.chdir(tmp_path)
    data_set(tmp_path / "pictures", {"a.png": b""})
    tree = {"keys": ["0"], "image_paths": ["../../pictures/a.png"], "prompts": ["a"]}
    (tmp_path / "lists" / "own").mkdir(parents=True)
    Path("lists/own/d.json").write_text(json.dumps(tree))
    _, said = checked(Path("lists/own/d.json"), tmp_path / "out", "--resolution", "8")
    assert found(said)["unreadable"]["samples"] == tree["image_paths"]
    assert "\n    pictures/a.png: " in "\n".join(caplog.messages)


def test_a_file_that_many_rows_name_counts_once_as_in_a_run(tmp_path):
    file = data_set(tmp_path, {"a.png": scene(0), "b.png": b""})
    tree = {
        column: values + 5 * values[1:] for column, values in json.loads(file.read_text()).items()
    }
    file.write_text(json.dumps(tree))
    status, said = checked(file, tmp_path / "out", TINY, "data.max_unreadable=1")
    assert status == 0 and len(found(said)["unreadable"]["samples"]) == 6


def test_data_sets_of_one_name_have_folders_of_their_own(tmp_path, monkeypatch):
    """Beside each; without a word of where."""
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        file = data_set(tmp_path / name, {f"{name}.png": scene(0)})
        assert check.main([f"{name}/data.json", "--resolution", "8", "--workers", "1"]) == 0
        tree = json.loads((tmp_path / name / "data.check" / "check.json").read_text())
        assert tree["dataset"] == str(file.relative_to(tmp_path))
    assert sorted(f.name for f in tmp_path.iterdir()) == ["one", "two"]


@pytest.mark.parametrize(
    ("count", "num", "words"),
    [
        (100, 100, "100 of 100 (100 %)"),
        (56, 400, "56 of 400 (14 %)"),
        (1, 10**7, "1 of 10,000,000 (less than 0.01 %)"),
        (10**6 - 1, 10**6, "999,999 of 1,000,000 (nearly 100 %)"),
        (0, 5, "0 of 5 (0 %)"),
    ],
)
def test_figures_have_no_exponents(count, num, words):
    assert share(count, num) == words
    assert (plain(2740.0), plain(0.034), plain(9.99)) == ("2,740", "0.034", "10")


def test_axes_begin_at_zero_and_count_in_equal_steps(tmp_path):
    axes = Figure().subplots()
    for values in (np.array([3, 3, 7]), np.array([0.5, 2.0]), np.array([5, 100000]), np.array([])):
        axes.clear()
        pictures._histogram(axes, values, "x", 4, "beyond")
        assert axes.get_xlim()[0] == axes.get_ylim()[0] == 0 and axes.get_yscale() == "linear"
        assert axes.get_xlim()[1] >= max([*values, 4]) and axes.get_ylim()[1] >= 1
        assert sum(bar.get_height() for bar in axes.patches) == len(values)
        assert axes.get_title("left").startswith(f"{(values > 4).sum()} of {len(values)} ")
    looks = [Look(200, 100, "RGB", 1, False, 1, 9.0, b"", 0, b"")]
    pictures._sizes(axes, looks, (50, 400))
    assert axes.get_xlim()[0] == axes.get_ylim()[0] == 0 and axes.get_xlim()[1] > 400


def test_a_caption_is_cut_to_its_tile_however_long_it_is():
    pen = ImageDraw.Draw(Image.new("RGB", (9, 9)))
    for text in ("a cat", "", "red " * 5000, "\0", "\u202ecat", "a\nb \ud83d", "雨" * 10**6):
        start = time.process_time()
        cut = pictures._cut_to(text, 128, pen)
        assert pen.textlength(cut) <= 128 and time.process_time() - start < 3
        assert cut == "a cat" or text != "a cat"
    assert pen.textlength(pictures._cut_to("red " * 5000, 128, pen)) > 120


def test_white_pictures_have_an_edge_and_the_crops_frame_is_inside(tmp_path):
    file = data_set(tmp_path, {"a.png": Image.new("RGB", (200, 60), "white")})
    checked(file, tmp_path / "out", "--resolution", "32")
    sheet = np.asarray(Image.open(tmp_path / "out" / "suspicious.png"))
    tile = sheet[22:150, 6:134]  # as training sees it: 128 x 128
    assert (tile[[0, -1]] < 200).all() and (tile[1:-1, 1:-1] == 255).all()
    cut = sheet[170 + 22 : 170 + 150, 6:134].astype(int)
    red, edge = (
        np.argwhere((cut == colour).all(-1)) for colour in ((200, 64, 47), (138, 151, 163))
    )
    assert len(red) and (red.min(0) >= edge.min(0)).all() and (red.max(0) <= edge.max(0)).all()


def test_sizes_by_hand():
    """A 200 x 100 picture at 50 x 50: half its size, and half of it is cut."""
    look = Look(200, 100, "RGB", 1, False, 1, 9.0, b"", 0, b"")
    assert enlargement(look, (50, 50)) == 0.5 and cut_away(look, (50, 50)) == 0.5
    assert enlargement(look, (50, 100)) == 0.5 and cut_away(look, (50, 100)) == 0
    assert enlargement(look, (400, 100)) == 4


def test_the_hash_is_that_of_scipys_cosine_transform():
    grey = np.random.default_rng(0).uniform(0, 255, (32, 32))
    lowest = dctn(grey, type=2)[:8, :8].ravel()  # 4 times ours
    bits = "".join("1" if value > np.median(lowest) else "0" for value in lowest)
    assert perceptual_hash(grey) == int(bits, 2)


def saved(picture: Image.Image, file: Path, **options) -> Look:
    picture.save(file, **options)
    look = look_at(str(file))
    assert isinstance(look, Look)
    return look


@pytest.mark.parametrize(
    ("name", "change", "near"),
    [
        ("jpeg", lambda p: p, True),
        ("half", lambda p: p.resize((120, 120), Image.Resampling.LANCZOS), True),
        ("brighter", lambda p: ImageEnhance.Brightness(p).enhance(1.04), True),
        ("mirror", lambda p: p.transpose(Image.Transpose.FLIP_LEFT_RIGHT), False),
        ("crop", lambda p: p.crop((40, 40, 240, 240)), False),
        (
            "colours",
            lambda p: Image.merge("RGB", [p.split()[0].point(lambda v: v // 3), *p.split()[1:]]),
            False,
        ),
    ],
)
def test_what_near_duplicates_are(tmp_path, name, change, near):
    """On parts of the two photographs that come with scikit-learn."""
    counts = []
    for photograph in load_sample_images().images:
        for x in (0, 160, 320):
            one = Image.fromarray(photograph).crop((x, 90, x + 240, 330))
            looks = [saved(one, tmp_path / "one.png")]
            looks.append(saved(change(one), tmp_path / "other.jpg", quality=70))
            counts.append(near_groups(looks) == [[0, 1]])
    assert counts == [near] * 6, name


def test_groups_equal_those_of_all_pairs():
    """Hashes a few bits from a few centres, thumbnails a few levels apart: brute force agrees."""
    random = np.random.default_rng(0)
    centres = random.integers(0, 2**63, 12)
    looks: list[Look | None] = [None]
    for i in range(150):
        bits = sum(1 << int(b) for b in random.choice(64, random.integers(0, 5), replace=False))
        level = 40 + 20 * random.integers(0, 4) + random.integers(0, 9)
        thumbnail = np.full(192, level, np.uint8).tobytes()
        digest = bytes([i % 140])
        number = int(centres[random.integers(12)]) ^ bits
        looks.append(Look(1, 1, "RGB", 1, False, 1, 9.0, digest, number, thumbnail))
    known = {i: look for i, look in enumerate(looks) if look}
    assert exact_groups(looks) == [[i + 1, i + 141] for i in range(10)]
    once = {i: look for i, look in known.items() if i <= 140}
    group = {i: i for i in once}
    for one, other in itertools.combinations(once, 2):
        a, b = once[one], once[other]
        levels = abs(a.thumbnail[0] - b.thumbnail[0])
        if (a.hash ^ b.hash).bit_count() <= BITS and levels <= LEVELS:
            old, new = group[other], group[one]
            group = {i: new if g == old else g for i, g in group.items()}
    members: dict[int, list[int]] = {}
    for i, g in group.items():
        members.setdefault(g, []).append(i)
    expected = sorted(m for m in members.values() if len(m) > 1)
    assert len(expected) > 12 and sorted(near_groups(looks)) == expected


def test_thousands_of_blank_pages_take_no_time():
    pages = [
        Look(1, 1, "L", 1, False, 1, 0.0, i.to_bytes(2), 0, b"\xff" * 192) for i in range(20_000)
    ]
    pages[7] = replace(pages[7], hash=2**40 - 1)  # a written one
    start = time.process_time()
    (group,) = near_groups(pages)
    assert len(group) == 19_999 and 7 not in group and time.process_time() - start < 5


def test_processes_agree_with_one(tmp_path):
    files = {f"{i}.png": scene(i) for i in range(4)} | {"bad.png": b""}
    data_set(tmp_path, files)
    paths = [tmp_path / name for name in [*files, "0.png", "gone.png"]]
    looks = look_at_all(paths, 2)
    assert looks == look_at_all(paths, 1) == [look_at(str(path)) for path in paths]
    assert isinstance(looks[4], str) and "No such file" in str(looks[6])


def test_token_lengths_are_those_of_the_tokenizers():
    readers = {r.name: r for r in read_tokenizers(TEACHER, 5)}
    assert (readers["tokenizer"].limit, readers["tokenizer_2"].limit) == (16, 5)
    lengths = {name: r.lengths(["a red seven", "a"]) for name, r in readers.items()}
    for name, (long, short) in lengths.items():  # two words more, and the ends of the sequence
        assert long == short + 2, name
    findings = caption_findings(["a red seven", "a"], lengths, {"tokenizer": 4, "tokenizer_2": 9})
    assert [(f.name, f.places) for f in findings] == [("long captions, tokenizer", [0])]


# ------------------------------------------------------------------------------------------- LMDB


def lmdb_of(folder: Path, latents: np.ndarray, prompts: list[str]) -> Path:
    with LatentsWriter(folder, {"of": "a test"}) as writer:
        writer.add(Chunk(latents.astype("<f2"), prompts, [], [1]))
        writer.finish(True, None)
    return folder


def test_an_lmdb_of_latents(tmp_path):
    latents = np.random.default_rng(0).normal(size=(6, 8, 8, 8))
    latents[3] = latents[1]
    latents[4, 0, 0, 0] = np.nan
    folder = lmdb_of(tmp_path / "lmdb", latents, ["a", "b", "", "b", "c", "d"])
    status, tree = checked(folder, tmp_path / "out")
    findings = found(tree)
    assert status == 0 and tree["latents"]["shape"] == [8, 8, 8]
    assert findings["unreadable"]["samples"] == ["row 4"]
    assert findings["duplicates"]["samples"] == [["row 1", "row 3"]]
    assert findings["empty captions"]["samples"] == ["row 2"]
    good = np.delete(latents, 4, 0).astype("<f2").astype(float)
    expected = good.transpose(1, 0, 2, 3).reshape(8, -1)
    np.testing.assert_allclose(tree["latents"]["channel_mean"], expected.mean(1), atol=1e-6)
    np.testing.assert_allclose(tree["latents"]["channel_deviation"], expected.std(1), atol=1e-6)
    assert "scale" not in findings


def test_a_row_that_is_not_there_stops_the_run(tmp_path):
    folder = lmdb_of(tmp_path / "lmdb", np.zeros((3, 8, 8, 8)), ["a", "b", "c"])
    environment = lmdb.open(str(folder), lock=False)
    with environment.begin(write=True) as txn:
        txn.delete(b"latents_1_data")
    environment.close()
    status, tree = checked(folder, tmp_path / "out")
    unread = found(tree)["unreadable"]
    assert status == 1 and unread["samples"] == ["row 1"]
    assert "has no latents_1_data" in unread["reasons"][0]


def test_an_lmdb_of_another_size_or_scale_is_said(tmp_path, caplog):
    latents = 5 * np.random.default_rng(0).normal(size=(4, 8, 8, 8))
    folder = lmdb_of(tmp_path / "lmdb", latents, list("abcd"))
    fits = checked(folder, tmp_path / "out", "--config", TINY)
    assert fits[0] == 0 and list(found(fits[1])) == ["scale"]
    status, tree = checked(folder, tmp_path / "out", "--config", TINY, "train.resolution=64")
    assert status == 1 and found(tree)["does not fit"]["level"] == "stops"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.json", "--resolution", "8"], "does not exist"),
        (["data.json"], "--config or --resolution"),
        (["data.json", "train.seed=1", "--resolution", "8"], "overrides are of a --config"),
        (["data.json", "--resolution", "8", "8", "8"], "one side, or height and width"),
        (["data.json", "--config", "no.yaml"], "config file not found"),
        (["data.json", "--resolution", "8", "--teacher", "."], "no model_index.json"),
        (["data.json", "--resolution", "8", "--workers", "0"], "0 must be from 1"),
        (["data.json", "--resolution", "8", "--workers", "1000000"], "1000000 must be from 1 to"),
        (["data.json", "--resolution", "1000000000"], "1000000000 must be from 1 to"),
        (["data.json", "one.yaml", "two.yaml"], "one.yaml and two.yaml: one CONFIG"),
        (["data.json", "no.yaml"], "config file not found: no.yaml"),
        (["data.json", "--resolution", "8", "--output", "data.json"], "is a file"),
        (["bad.json", "--resolution", "8"], "is not valid JSON"),
        (["folder"], "is not an LMDB.* senseflow.data.make makes one"),
    ],
)
def test_mistakes_are_said_in_one_line(tmp_path, monkeypatch, capsys, words, message):
    data_set(tmp_path, {"a.png": scene(0)})
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    assert status_of(check.main, words) == 2
    said = capsys.readouterr().err
    assert re.search(message, said) and said.count("\n") == 1
    assert not (tmp_path / "runs").exists()
