"""The command as a user types it: results, resuming, and one clear line for bad input."""

import json
import shutil

import pytest
import torch
from image_folders import PROMPTS, draw, write_images, write_seeds
from metric_parts import TINY_CLIP, copy_folder, error_of, save_torchscript_inception, score, value
from safetensors.torch import load_file, save_file

from senseflow.evaluate.__main__ import main
from senseflow.evaluate.folders import Picture, inspect, read_folder

CLIP = ("--metrics", "clip", "--clip_model", f"local-dir:{TINY_CLIP}")
SMALL = (32, 32)
FIELDS = {
    "name", "metric", "value", "num_images", "num_prompts", "images", "reference", "weights",
    "model", "preprocessing", "versions", "settings", "notes",
}  # fmt: skip


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    return save_torchscript_inception(tmp_path_factory.mktemp("inception") / "inception.pt")


@pytest.fixture
def images(tmp_path):
    return write_images(tmp_path / "images", size=SMALL)


def test_an_entry_says_all_that_a_value_depends_on(images, tmp_path, inception):
    reference = write_images(tmp_path / "teacher", start=40, size=SMALL)
    flags = ("--metrics", "fid_t", "clip", "--reference", reference, "--inception", inception)
    entries = score(images, tmp_path / "new" / "r.json", *flags, *CLIP[2:])
    assert [e["metric"] for e in entries] == ["fid_t", "clip"]
    for entry in entries:
        assert entry.keys() >= FIELDS
        assert entry["name"] == "student" and entry["num_images"] == entry["num_prompts"] == 5
        assert entry["versions"].keys() >= {"torch", "senseflow", "open_clip_torch"}
        assert len(entry["weights"][0]["sha256"]) == 64
    assert entries[0]["reference"] == str(reference) and entries[1]["reference"] is None
    # with these names a file of an older version is known again, and its values are kept
    assert entries[0]["settings"] == {"resize": 512}
    told = {"prefix": "A photo depicts ", "resize": 256, "dtype": "float32"}
    assert entries[1]["settings"].items() > told.items() and "config" in entries[1]["settings"]
    assert entries[1]["model"] == "open_clip local-dir:clip"
    assert not list((tmp_path / "new").glob("*.partial"))


def test_a_result_is_not_computed_again_unless_asked_or_changed(images, tmp_path, capsys):
    output = tmp_path / "r.json"
    (first,) = score(images, output, *CLIP)
    kept = output.stat().st_mtime_ns
    moved = images.rename(tmp_path / "moved")
    score(moved, output, *CLIP)
    assert output.stat().st_mtime_ns == kept and "as measured before" in capsys.readouterr().err
    score(moved, output, *CLIP, "--again")
    assert output.stat().st_mtime_ns != kept
    _, other = score(moved, output, *CLIP, "--clip_prefix", "")  # measured in another way
    assert other["settings"] != first["settings"] and other["value"] != first["value"]
    draw(77, SMALL).save(moved / "00000_a-red-fox.png")
    kept, changed = score(moved, output, *CLIP, "--clip_prefix", "")
    assert kept["value"] == first["value"] and changed["settings"] == other["settings"]
    assert changed["images_digest"] != other["images_digest"]
    assert changed["value"] != other["value"]


def test_rows_and_metrics_stand_beside_each_other(images, tmp_path, capsys):
    output = tmp_path / "r.json"
    seeds = write_seeds(tmp_path / "seeds", 2)
    score(images, output, *CLIP)
    entries = score(seeds, output, "--metrics", "diversity_clip", *CLIP[2:], "--name", "student")
    assert [e["metric"] for e in entries] == ["clip", "diversity_clip"]
    assert "is of other images for clip" in capsys.readouterr().err
    entries = score(images, output, *CLIP, "--name", "other")
    assert [e["name"] for e in entries] == ["student", "student", "other"]


def test_others_images_with_a_file_of_prompts(images, tmp_path):
    output = tmp_path / "r.json"
    ours = value(images, output, *CLIP)
    plain = tmp_path / "plain"
    plain.mkdir()
    for number, file in enumerate(sorted(images.glob("0*.png"))):
        (plain / f"{number + 8}.png").write_bytes(file.read_bytes())  # 8, 9, 10: by their value
    lines, table, lists = (tmp_path / f"p.{s}" for s in ("txt", "json", "lists.json"))
    lines.write_text("\n".join(PROMPTS) + "\n\n")
    names = [f"{n + 8}.png" for n in range(5)]
    table.write_text(json.dumps(dict(zip(names, PROMPTS, strict=True))))
    paths = [f"plain/{name}" for name in names]
    lists.write_text(json.dumps({"keys": names, "image_paths": paths, "prompts": PROMPTS}))
    for number, file in enumerate((lines, table, lists)):
        output = tmp_path / f"{number}.json"
        assert value(plain, output, *CLIP, "--prompts_file", file) == pytest.approx(ours, rel=1e-6)


def test_a_table_of_prompts_is_read_by_the_images_names_or_in_their_order(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in (8, 9, 10):
        draw(number, SMALL).save(folder / f"{number}.png")
    wanted = ["cat 8", "cat 9", "cat 10"]
    rows = [{"file_name": f"{n}.png", "text": f"cat {n}"} for n in (10, 8, 11, 9)]
    for name, text in (
        ("metadata.csv", "Text,File_Name\ncat 10,a/10.png\ncat 9,9.png\ncat 8,8.png\n"),
        ("metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows)),
        ("p.tsv", "id\tprompt\n3\tcat 8\n2\tcat 9\n1\tcat 10\n"),
        ("p.ndjson", "".join(json.dumps({"prompt": text}) + "\n" for text in wanted)),
        ("list.json", json.dumps(wanted)),
        ("p.txt", "cat 8\r\ncat 9\r\n\r\ncat 10"),
    ):
        (tmp_path / name).write_text(text)
        assert read_folder(folder, tmp_path / name).prompts == wanted, name
    (tmp_path / "p.csv").write_text("Blip,text\ncat 8,a\ncat 9,b\ncat 10,c\n")
    assert read_folder(folder, tmp_path / "p.csv", "blip").prompts == wanted
    for name, text, said in (
        ("p.csv", "8.png,cat 8\n9.png,cat 9\n10.png,cat 10\n", "no column of prompts"),
        ("p.csv", "file_name,text\n8.png,a\n8.png,b\n", "has two prompts for 8.png"),
        ("p.csv", "file_name,text\n8.png,a\n9.png,b\n", r"has no prompt for .*10\.png"),
        ("p.json", '{"8.png": 1}', "must hold a list of texts"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=said):
            read_folder(folder, tmp_path / name)


def test_real_images_as_a_reference_are_not_compared_by_prompt(images, tmp_path, inception):
    real = write_images(tmp_path / "real", start=70, sidecars=False, size=SMALL)
    flags = ("--metrics", "fid_t", "--reference", real, "--inception", inception)
    (entry,) = score(images, tmp_path / "r.json", *flags)
    assert any("were not compared" in note for note in entry["notes"])
    assert entry["num_reference"] == 5  # without the grid


def bad_folders(tmp_path):
    """Name, flags, and what the line must say."""
    empty = tmp_path / "empty"
    empty.mkdir()
    yield empty, CLIP, f"{empty} holds no images"
    yield tmp_path / "nowhere", CLIP, "nowhere is not a folder"
    cut = write_images(tmp_path / "cut", size=SMALL)
    data = (cut / "00003_a-white-fox.png").read_bytes()
    (cut / "00003_a-white-fox.png").write_bytes(data[: len(data) // 2])
    yield cut, CLIP, "00003_a-white-fox.png cannot be read as an image"
    jpeg = tmp_path / "jpeg"  # whose header and checks are fine
    jpeg.mkdir()
    draw(0, (64, 64)).save(jpeg / "a.jpg")
    data = (jpeg / "a.jpg").read_bytes()
    (jpeg / "a.jpg").write_bytes(data[: len(data) // 2])
    (tmp_path / "one.txt").write_text("a fox")
    flags = (*CLIP, "--prompts_file", tmp_path / "one.txt")
    yield jpeg, flags, "a.jpg cannot be read as an image"
    mixed = write_images(tmp_path / "mixed", size=SMALL)
    draw(0, (64, 32)).save(mixed / "00002_a-green-fox.png")
    yield mixed, CLIP, "00002_a-green-fox.png is 64x32 where"
    bare = write_images(tmp_path / "bare", sidecars=False, size=SMALL)
    yield bare, CLIP, "the prompts of"
    half = write_images(tmp_path / "half", size=SMALL)
    (half / "00001_a-blue-fox.json").unlink()
    yield half, CLIP, "00001_a-blue-fox.png has no sidecar"
    twice = write_images(tmp_path / "twice", size=SMALL)
    for suffix in (".png", ".json"):
        source = twice / f"00001_a-blue-fox{suffix}"
        (twice / f"00001_b{suffix}").write_bytes(source.read_bytes())
    yield twice, CLIP, "are both of prompt 1"
    odd = write_images(tmp_path / "odd", size=SMALL)
    (odd / "00001_a-blue-fox.json").write_text('{"prompt"')
    yield odd, CLIP, "00001_a-blue-fox.json is not a sidecar"
    seeds = write_seeds(tmp_path / "seeds", 2)
    (seeds / "seed_1" / "00004_a-black-fox.png").unlink()
    (seeds / "seed_1" / "00004_a-black-fox.json").unlink()
    yield seeds, CLIP, "00004 is 'a black fox' in the first and missing in the second"
    yield odd, (*CLIP, "--prompts_file", tmp_path / "one.txt"), "has 1 prompts for the 5 images"
    (tmp_path / "p.csv").write_text("".join(f"{n}.png,cat {n}\n" for n in range(5)))
    yield odd, (*CLIP, "--prompts_file", tmp_path / "p.csv"), "p.csv has no column of prompts"


def test_a_bad_folder_is_one_clear_line(tmp_path, capsys):
    for folder, flags, words in bad_folders(tmp_path):
        assert words in error_of(capsys, folder, tmp_path / "r.json", *flags)
    assert not (tmp_path / "r.json").exists()


def test_damage_is_found_before_any_model_is_loaded(images):
    file = images / "00000_a-red-fox.png"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"00000_a-red-fox\.png cannot be read"):
        inspect(Picture(file, "0", None))


def test_a_reference_of_other_prompts_is_named(images, tmp_path, inception, capsys):
    teacher = write_images(tmp_path / "teacher", [*PROMPTS[:3], "a cat", PROMPTS[4]], size=SMALL)
    flags = ("--metrics", "fid_t", "--reference", teacher, "--inception", inception)
    said = error_of(capsys, images, tmp_path / "r.json", *flags)
    assert "00003 is 'a white fox' in the first and 'a cat' in the second" in said


def test_a_reference_must_hold_each_prompt_as_often(tmp_path, inception, capsys):
    ours = write_images(tmp_path / "ours", ["a fox", "a fox", "a cat"], size=SMALL)
    teacher = write_images(tmp_path / "teacher", ["a fox", "a cat", "a cat"], size=SMALL)
    flags = ("--metrics", "fid_t", "--reference", teacher, "--inception", inception)
    said = error_of(capsys, ours, tmp_path / "r.json", *flags)
    assert "00001 is 'a fox' in the first and 'a cat' in the second" in said


def tell(folder, **settings):
    """Add settings to all sidecars of a folder."""
    for file in folder.glob("*.json"):
        file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def test_images_made_in_two_ways_are_not_one_set(tmp_path, capsys):
    """Drawn again in part: other weights in two of four seeds, other steps in some prompts."""
    seeds = write_seeds(tmp_path / "seeds", 4)
    for seed in range(4):
        settings = {"steps": 4, "checkpoint_weights": "b" if seed < 2 else "a"}
        tell(seeds / f"seed_{seed}", **settings, versions={"torch": str(seed)})
    said = error_of(capsys, seeds, tmp_path / "r.json", *CLIP)
    assert f"{seeds}/seed_2/00000_a-red-fox.png" in said and "seed_0/00000_a-red-fox.png" in said
    assert "(checkpoint_weights a, not b)" in said
    for seed in (2, 3):
        tell(seeds / f"seed_{seed}", checkpoint_weights="b")
    score(seeds, tmp_path / "r.json", *CLIP)
    one = write_images(tmp_path / "one", size=SMALL)
    file = one / "00003_a-white-fox.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "steps": 1}))
    said = error_of(capsys, one, tmp_path / "r.json", *CLIP)
    assert (
        "00003_a-white-fox.png was made with other settings" in said
        and "(steps 1, not None)" in said
    )


def test_folders_of_benchmarks_are_read_as_they_are(tmp_path, capsys):
    """The same images in seed folders, and in two categories with a prompt 0 each."""
    seeds = write_seeds(tmp_path / "seeds", 3)
    places = ["color", "color", "shape", "shape", "shape"]
    for file in seeds.rglob("0*.png"):
        told = json.loads(file.with_suffix(".json").read_text())
        place = tmp_path / "t2i" / places[told["index"]]
        own = {**told, "index": told["index"] % 2 if place.name == "color" else told["index"] - 2}
        name = f"{told['prompt']}_{told['seed'] // 100:06d}"
        for part in ("samples", "sidecars"):
            (place / part).mkdir(parents=True, exist_ok=True)
        shutil.copy(file, place / "samples" / f"{name}.png")
        (place / "sidecars" / f"{name}.json").write_text(json.dumps(own))
    flags = ("--metrics", "clip", "diversity_clip", *CLIP[2:])
    first = score(seeds, tmp_path / "a.json", *flags)
    second = score(tmp_path / "t2i", tmp_path / "b.json", *flags)
    for one, other in zip(first, second, strict=True):
        assert other["value"] == pytest.approx(one["value"], rel=1e-5)
        assert (other["num_images"], other["num_prompts"]) == (15, 5)
    (tmp_path / "t2i" / "shape" / "samples" / "a green fox_000002.png").unlink()
    said = error_of(capsys, tmp_path / "t2i", tmp_path / "b.json", *flags)
    assert "holds 2 images of 'a green fox' and 3 of" in said


def test_mixed_sizes_are_allowed_when_said(images, tmp_path):
    draw(0, (64, 32)).save(images / "00002_a-green-fox.png")
    (entry,) = score(images, tmp_path / "r.json", *CLIP, "--mixed_sizes")
    assert entry["image_size"] == "mixed"


def test_two_images_at_least(tmp_path, inception, capsys):
    one = write_images(tmp_path / "one", PROMPTS[:1], size=SMALL)
    flags = ("--metrics", "fid_t", "--reference", one, "--inception", inception)
    assert "holds one image" in error_of(capsys, one, tmp_path / "r.json", *flags)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--metrics", "fid_t"), "fid_t needs --inception"),
        (("--metrics", "fid_t", "--inception", __file__), "fid_t needs --reference"),
        (("--metrics", "hps_v2.1"), "hps_v2.1 needs --hps_v2.1"),
        (("--metrics", "fid"), "invalid choice: 'fid'"),
        ((*CLIP, "--batch_size", "0"), "argument --batch_size: 0 must be from 1 to 65536"),
        ((*CLIP, "--clip_weights", "nowhere.bin"), "--clip_weights nowhere.bin is not a file"),
        ((*CLIP, "--clip_quick_gelu", "yes"), "invalid choice: 'yes'"),
        ((*CLIP, "--name", " "), "--name is empty"),
        ((*CLIP, "--device", "gpu"), "--device gpu is not a device"),
        ((*CLIP, "--clip_model", "ViT-Z"), "ViT-Z is neither an open_clip architecture"),
    ],
)
def test_wrong_flags(images, tmp_path, capsys, flags, words):
    if "--device" in flags:
        status = main(["score", "--images", str(images), "--name", "a", *flags])
        assert status == 2 and words in capsys.readouterr().err
    else:
        assert words in error_of(capsys, images, tmp_path / "r.json", *flags)


def test_an_output_that_is_something_else_is_kept(images, tmp_path, capsys):
    output = tmp_path / "r.json"
    for text in ("{", '{"a": 1}', '[{"a": 1}]'):
        output.write_text(text)
        assert "r.json" in error_of(capsys, images, output, *CLIP)
        assert output.read_text() == text


def test_an_output_that_cannot_be_written_is_said_before_measuring(images, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    said = error_of(capsys, images, tmp_path / "file" / "r.json", *CLIP, "--clip_prefix", "")
    assert "--output" in said and "cannot be written" in said


def test_a_value_that_is_not_a_number_is_not_written(images, tmp_path, capsys):
    folder = copy_folder(TINY_CLIP, tmp_path / "clip")
    state = load_file(folder / "open_clip_model.safetensors")
    state["visual.proj"] = torch.full_like(state["visual.proj"], float("nan"))
    save_file(state, folder / "open_clip_model.safetensors")
    flags = ("--metrics", "clip", "--clip_model", f"local-dir:{folder}")
    said = error_of(capsys, images, tmp_path / "r.json", *flags)
    assert "00000_a-red-fox.png is not finite" in said and not (tmp_path / "r.json").exists()
