"""The JSON data set: what it reads, how it fits pictures, and what it says of bad input."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from short_runs import begin, configure, finish, write_pictures
from transformers import CLIPTokenizer

from benchmarks import images
from senseflow.data.decode import box_of
from senseflow.data.image_lists import read_lists
from senseflow.data.items import Position, Unreadable, UnreadableImagesError
from senseflow.data.json_images import JsonImages

TOKENIZER = "assets/tiny/flux/pipeline/tokenizer"


def write(folder: Path, pictures: list[Image.Image | bytes], **changes) -> Path:
    """A data set of these pictures; bytes are written as they are."""
    names = []
    for i, picture in enumerate(pictures):
        names.append(f"{i}.png")
        if isinstance(picture, bytes):
            (folder / names[-1]).write_bytes(picture)
        else:
            picture.save(folder / names[-1])
    num = len(pictures)
    lists = {
        "keys": [str(i) for i in range(num)],
        "image_paths": names,
        "prompts": [f"picture {i}" for i in range(num)],
        **changes,
    }
    file = folder / "data.json"
    file.write_text(json.dumps(lists))
    return file


def solid(colour, size=(8, 8), mode="RGB") -> Image.Image:
    return Image.new(mode, size, colour)


def at(item: int, iteration: int = 1, index: int = 0) -> Position:
    return Position(iteration, index, item)


def test_reads_images_in_range_with_their_prompts(tmp_path):
    data = JsonImages(write(tmp_path, [solid("black"), solid("white")]), (8, 8))
    assert len(data) == 2
    black, white = data[at(0, index=5)], data[at(1)]
    assert black.image.shape == (3, 8, 8) and (black.image == -1).all() and (white.image == 1).all()
    assert (black.prompt, black.index, black.unreadable) == ("picture 0", 5, [])


def test_wide_pictures_keep_their_aspect_and_are_cut_in_the_middle(tmp_path):
    """Red, green, blue thirds of a 24 x 8 picture: the middle 8 x 8 is green."""
    wide = Image.fromarray(np.repeat(np.eye(3, dtype=np.uint8)[None] * 255, 8, 0).repeat(8, 1))
    data = JsonImages(write(tmp_path, [wide]), (8, 8))
    expected = torch.tensor([-1.0, 1.0, -1.0]).view(3, 1, 1).expand(3, 8, 8)
    assert torch.equal(data[at(0)].image, expected)


@pytest.mark.parametrize("resolution", [(16, 16), (8, 24), (32, 8)])
def test_any_resolution(tmp_path, resolution):
    data = JsonImages(write(tmp_path, [solid("red", (13, 29))]), resolution)
    assert data[at(0)].image.shape == (3, *resolution)


def test_random_crop_depends_on_the_place_in_the_run_alone(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 64, 3), dtype=np.uint8))
    file = write(tmp_path, [noise])
    data = JsonImages(file, (8, 8), crop="random", seed=3)
    same = JsonImages(file, (8, 8), crop="random", seed=3)
    assert torch.equal(data[at(0, 4, 2)].image, same[at(0, 4, 2)].image)
    crops = {tuple(data[at(0, i, 2)].image.flatten().tolist()) for i in range(20)}
    assert len(crops) > 5
    apart = {
        tuple(data[Position(i, 2, 0, separate=True)].image.flatten().tolist()) for i in range(20)
    }
    assert len(apart) > 5 and apart != crops  # the second draw has crops of its own


def test_modes_are_brought_to_rgb(tmp_path):
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    palette = solid("red").convert("P")
    pictures = [solid(128, mode="L"), clear, palette, solid(1, mode="1")]
    data = JsonImages(write(tmp_path, pictures), (8, 8))
    images = [data[at(i)].image for i in range(4)]
    assert all(image.shape == (3, 8, 8) for image in images)
    assert (images[1] == 1).all()  # transparency is white
    assert images[2][0].min() == 1 and images[2][1].max() == -1


def test_sixteen_bits_keep_their_greys_and_unknown_ranges_are_skipped(tmp_path):
    ramp = np.linspace(0, 65535, 64).reshape(8, 8)
    Image.fromarray(ramp.astype(np.float32)).save(tmp_path / "float.tiff")
    pictures = [Image.fromarray(ramp.astype(np.uint16)), (tmp_path / "float.tiff").read_bytes()]
    data = JsonImages(write(tmp_path, pictures), (8, 8))
    expected = torch.tensor(ramp / 65535 * 2 - 1).float()
    torch.testing.assert_close(data[at(0)].image[0], expected, atol=1 / 255, rtol=0)
    item = data[at(1)]
    assert item.prompt == "picture 0" and "no known range" in item.unreadable[0][1]


def test_upright_by_exif(tmp_path):
    wide = Image.fromarray(np.repeat(np.eye(3, dtype=np.uint8)[None] * 255, 8, 0).repeat(8, 1))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    wide.save(tmp_path / "0.png", exif=exif)
    (tmp_path / "data.json").write_text(
        json.dumps({"keys": ["0"], "image_paths": ["0.png"], "prompts": ["a"]})
    )
    image = JsonImages(tmp_path / "data.json", (24, 8))[at(0)].image
    assert image[:, 0, 4].tolist() == [1, -1, -1] and image[:, 23, 4].tolist() == [-1, -1, 1]


def test_paths_beside_the_file_or_in_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "set").mkdir()
    (tmp_path / "work").mkdir()
    solid("black").save(tmp_path / "set" / "a.png")
    solid("white").save(tmp_path / "work" / "b.png")
    lists = {"keys": ["a", "b"], "image_paths": ["a.png", "b.png"], "prompts": ["a", "b"]}
    (tmp_path / "set" / "data.json").write_text(json.dumps(lists))
    monkeypatch.chdir(tmp_path / "work")
    data = JsonImages(tmp_path / "set" / "data.json", (8, 8))
    assert (data[at(0)].image == -1).all() and (data[at(1)].image == 1).all()


def test_fingerprints_tell_data_sets_apart_and_not_their_folders(tmp_path):
    pictures = [solid("black"), solid("white")]
    changes = ({}, {}, {"prompts": ["picture 1", "picture 0"]}, {"image_paths": ["1.png", "0.png"]})
    found = []
    for i, change in enumerate(changes):
        (tmp_path / str(i)).mkdir()
        found.append(JsonImages(write(tmp_path / str(i), pictures, **change), (8, 8)).fingerprint())
    assert found[0] == found[1] and len(set(found)) == 3


def test_a_truncated_image_is_replaced_by_the_next_and_reported(tmp_path):
    solid("red", (64, 64)).save(tmp_path / "whole.png")
    cut = (tmp_path / "whole.png").read_bytes()[:100]
    data = JsonImages(write(tmp_path, [cut, b"not an image", solid("white")]), (8, 8))
    item = data[at(0)]
    assert item.prompt == "picture 2" and (item.image == 1).all()
    assert [Path(path).name for path, _ in item.unreadable] == ["0.png", "1.png"]


def test_a_prompt_with_half_an_emoji_is_passed_over_as_an_image_that_cannot_be_read(tmp_path):
    """What scrapers leave that cut a text by its UTF-16 units; JSON can write it, UTF-8 cannot."""
    prompts = ["a cat \ud83d", "\udc00", "whole \U0001f600"]
    data = JsonImages(write(tmp_path, [solid("white")] * 3, prompts=prompts), (8, 8))
    item = data[at(0)]
    assert item.prompt == "whole \U0001f600" and [*data.all_prompts()] == prompts[2:]
    name = f"{tmp_path}/0.png (row 0)"
    assert item.unreadable[0] == (
        name, "its prompt holds half of a character, as of an emoji cut in two",
    )  # fmt: skip
    assert CLIPTokenizer.from_pretrained(TOKENIZER)(item.prompt)["input_ids"]
    with pytest.raises(TypeError):  # which a run ended with
        CLIPTokenizer.from_pretrained(TOKENIZER)(prompts[0])


def test_a_run_goes_past_captions_and_files_that_cannot_be_read(tmp_path, caplog):
    """From the commands' data set to iterations: half an emoji, a pipe, a byte order mark."""
    write_pictures(tmp_path / "data")
    file = tmp_path / "data" / "data.json"
    tree = json.loads(file.read_text())
    tree["prompts"][:4] = ["a cat \ud83d", "a\0b", "   ", "\u202ecat"]
    os.mkfifo(tmp_path / "data" / "pipe.png")
    tree["image_paths"][5] = "pipe.png"
    file.write_text(json.dumps(tree), encoding="utf-8-sig")
    settings = ("adversarial.kind=none", "isg.weight=0", "train.batch_size=4", "train.iter_num=2")
    finish(begin(configure(file, *settings), tmp_path / "run"))
    listed = (tmp_path / "run" / "unreadable.txt").read_text(encoding="utf-8").splitlines()
    assert sorted(row.split("\t")[1].split(",")[0] for row in listed) == [
        "a pipe", "its prompt holds half of a character",
    ]  # fmt: skip
    assert (tmp_path / "run" / "last_iter").read_text() == "2\n"


def test_pipes_devices_and_names_that_are_none_are_unreadable_and_nothing_waits(tmp_path):
    file = write(tmp_path, [solid("white")])
    os.mkfifo(tmp_path / "pipe.png")
    names = ["pipe.png", "/dev/zero", "x" * 5000, "a\0b", ".", "0.png"]
    tree = {"keys": names, "image_paths": names, "prompts": names}
    file.write_text(json.dumps(tree), encoding="utf-8-sig")  # as an editor of Windows saves it
    item = JsonImages(file, (8, 8))[at(0)]
    assert item.path == "0.png"
    reasons = [reason for _, reason in item.unreadable]
    assert [reason.split(":")[0] for reason in reasons[:2]] == ["a pipe, a device or a folder"] * 2
    assert "too long" in reasons[2] and "null" in reasons[3]


def test_a_name_that_utf8_cannot_write_is_listed_and_known_again(tmp_path):
    """A file of another system: café in Latin-1; and one with a line end."""
    for _ in range(2):
        unreadable = Unreadable(tmp_path / "unreadable.txt", limit=2)
        unreadable.note([("caf\udce9.png", "cut\nshort"), ("a\nb.png", "cut")])
        unreadable.check(len(unreadable.seen))
    rows = (tmp_path / "unreadable.txt").read_text(encoding="utf-8").splitlines()
    assert rows == ["caf\\udce9.png\tcut short", "a b.png\tcut"]


def test_nothing_readable_is_an_error(tmp_path):
    data = JsonImages(write(tmp_path, [b"", b""]), (8, 8))
    with pytest.raises(UnreadableImagesError, match="2 of 2 images in a row could not be read"):
        data[at(0)]


def test_unreadable_files_are_listed_once_and_stop_the_run_past_the_limit(tmp_path, caplog):
    unreadable = Unreadable(tmp_path / "unreadable.txt", limit=2)
    unreadable.note([("a.png", "truncated"), ("b.png", "truncated")])
    unreadable.note([("a.png", "truncated")])
    assert (tmp_path / "unreadable.txt").read_text() == "a.png\ttruncated\nb.png\ttruncated\n"
    unreadable.check(len(unreadable.seen))
    again = Unreadable(tmp_path / "unreadable.txt", limit=2)  # a run that goes on
    again.note([("b.png", "truncated"), ("c.png", "missing")])
    with pytest.raises(UnreadableImagesError, match=r"3 images.*max_unreadable allows 2"):
        again.check(len(again.seen))
    assert "skipped a.png: truncated" in caplog.text


def test_a_file_that_several_ranks_met_is_one(tmp_path):
    """What the loop does past the limit: the names of all ranks count once."""
    ranks = [Unreadable(tmp_path / f"{i}.txt", limit=2) for i in range(2)]
    for rank in ranks:
        rank.note([("a.png", "truncated"), ("b.png", "truncated")])
    for rank in ranks:
        rank.know({"a.png", "b.png"})
        rank.check(len(rank.seen))
    assert [len(rank.seen) - rank.known for rank in ranks] == [0, 0]
    ranks[1].note([("c.png", "missing")])
    assert len(ranks[0].seen) + len(ranks[1].seen) - ranks[1].known == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("[" * 5000, "is not valid JSON: it is nested too deeply"),
        ("[]", "has no keys, image_paths, prompts"),
        ('{"keys": [], "prompts": []}', "has no image_paths"),
        (
            '{"keys": ["a"], "image_paths": ["a", "b"], "prompts": ["a"]}',
            "different lengths: 1 keys, 2 image_paths, 1 prompts",
        ),
        ('{"keys": [], "image_paths": [], "prompts": []}', "is empty"),
        ('{"keys": 5, "image_paths": [], "prompts": []}', "keys is not a list"),
        ('{"keys": ["a"], "image_paths": ["a"], "prompts": "a"}', "prompts is not a list"),
        (
            '{"keys": ["a", "b"], "image_paths": ["a", "b"], "prompts": ["a", null]}',
            r"prompts\[1\] is not text: None",
        ),
    ],
)
def test_bad_files_are_named(tmp_path, text, message):
    file = tmp_path / "bad.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=f"bad.json.*{message}"):
        read_lists(file)
    with pytest.raises(ValueError, match=r"nowhere.json not found"):
        read_lists(tmp_path / "nowhere.json")


def test_what_an_earlier_run_listed_is_told_from_what_is_new(tmp_path):
    """Every rank reads the whole list; only one of them may count it."""
    first = Unreadable(tmp_path / "run" / "unreadable.txt", limit=9)
    first.note([("a.png", "cut"), ("b.png", "cut")])
    assert (first.known, len(first.seen)) == (0, 2)
    again = Unreadable(tmp_path / "run" / "unreadable.txt", limit=9)
    again.note([("b.png", "cut"), ("c.png", "cut")])
    assert (again.known, len(again.seen)) == (2, 3)


def photo() -> Image.Image:
    """Soft shapes and a little noise, 300 x 200."""
    y, x = np.mgrid[:200, :300] / 20
    shapes = np.stack([np.sin(x) * np.cos(y), np.sin(x + y), np.cos(x * y / 9)], -1)
    noise = np.random.default_rng(0).normal(0, 4, shapes.shape)
    return Image.fromarray((127 + 90 * shapes + noise).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("resolution", [(64, 64), (80, 48), (256, 256)])
@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("RGB", {}),
        ("RGB", {"progressive": True, "subsampling": 0}),
        ("L", {}),
        ("CMYK", {}),
        *(("RGB", {"turned": turned}) for turned in range(2, 9)),
    ],
)
def test_a_jpeg_is_what_pillows_bicubic_filter_makes_of_it(tmp_path, mode, options, resolution):
    options = dict(options)
    exif = Image.Exif()
    exif[0x0112] = options.pop("turned", 1)
    photo().convert(mode).save(tmp_path / "0.jpg", quality=95, exif=exif, **options)
    data = JsonImages(write(tmp_path, [b""], image_paths=["0.jpg"]), resolution)
    upright = ImageOps.exif_transpose(Image.open(tmp_path / "0.jpg")).convert("RGB")
    size = resolution[::-1]
    expected = np.asarray(ImageOps.fit(upright, size, Image.Resampling.BICUBIC), np.float32)
    levels = (data[at(0)].image.permute(1, 2, 0).numpy() + 1) * 127.5
    assert np.abs(levels - expected).mean() < 0.6  # the cut's edges are whole pixels
    lanczos = np.asarray(ImageOps.fit(upright, size, Image.Resampling.LANCZOS), np.float32)
    assert np.abs(levels - lanczos).mean() < 1


def test_what_is_stored_exactly_is_resized_by_lanczos_to_the_bit(tmp_path):
    data = JsonImages(write(tmp_path, [photo()]), (64, 96))
    expected = np.asarray(ImageOps.fit(photo(), (96, 64), Image.Resampling.LANCZOS), np.float32)
    assert np.array_equal(data[at(0)].image.permute(1, 2, 0).numpy(), expected / 127.5 - 1)


@pytest.mark.parametrize(
    ("size", "resolution", "where", "box"),
    [
        ((3000, 2000), (1024, 1024), (0.5, 0.5), (0, 2000, 500, 2500)),
        ((3001, 2000), (1024, 1024), (0.5, 0.5), (0, 2000, 500, 2501)),  # 500.5 and 2500.5
        ((3000, 2000), (768, 1360), (0.5, 0.5), (153, 1847, 0, 3000)),  # 152.94 and 1847.06
        ((3000, 2000), (1024, 1024), (0.3, 0.0), (0, 2000, 0, 2000)),
        ((3000, 2000), (1024, 1024), (1.0, 1.0), (0, 2000, 1000, 3000)),
        ((8, 8), (8, 8), (0.5, 0.5), (0, 8, 0, 8)),
    ],
)
def test_the_cut_of_a_photo_is_whole_pixels(size, resolution, where, box):
    rows, columns = box_of(size, resolution, where)
    assert (rows.start, rows.stop, columns.start, columns.stop) == box


def test_the_benchmark_says_times_and_difference(tmp_path, monkeypatch, capsys):
    photo().save(tmp_path / "0.jpg", quality=95)
    monkeypatch.setattr(images, "TIMES", 1)
    images.compare(tmp_path / "0.jpg")
    read, lanczos, apart = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"read: \d+ ms", read) and re.fullmatch(r"lanczos: \d+ ms", lanczos)
    assert re.fullmatch(r"apart: 0\.\d\d grey levels, \d+ at most", apart)
