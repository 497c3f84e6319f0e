"""The converter: rows against the VAE called here, the LMDB read with lmdb itself, and kills."""

import json
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from python import PYTHON
from small_disk import fill, grow, small_disk
from statuses import status_of

from senseflow.core.draws import Draws
from senseflow.data.convert import latents_writer
from senseflow.data.convert.__main__ import main
from senseflow.data.convert.latents_writer import LatentsWriter
from senseflow.data.dataset import open_dataset
from senseflow.data.items import Position
from senseflow.data.latents_lmdb import LatentsLmdb, LatentsScaling

SIZE = 16  # pixels; latents are 8 x 8


def save_vae(folder: Path, channels: int, **config) -> Path:
    torch.manual_seed(channels)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=channels,
        **config,
    )
    vae.save_pretrained(folder / "vae")
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return save_vae(tmp_path_factory.mktemp("sdxl"), 4, scaling_factor=0.13025)


@pytest.fixture(scope="module")
def other_teacher(tmp_path_factory) -> Path:
    """16 channels and a shift, as FLUX has."""
    folder = tmp_path_factory.mktemp("flux")
    return save_vae(folder, 16, scaling_factor=0.3611, shift_factor=0.1159)


def picture(i: int, size: tuple[int, int] = (SIZE, SIZE)) -> Image.Image:
    pixels = np.random.default_rng(i).integers(0, 255, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def write_json(folder: Path, num: int) -> Path:
    folder.mkdir(exist_ok=True)
    names = [f"{i}.png" for i in range(num)]
    for i, name in enumerate(names):
        picture(i).save(folder / name)
    prompts = [f"día {i}" for i in range(num)]
    lists = {"keys": names, "image_paths": names, "prompts": prompts}
    (folder / "data.json").write_text(json.dumps(lists))
    return folder / "data.json"


def write_shards(folder: Path, nums: list[int], shape=(4, 8, 8)) -> np.ndarray:
    """As DMD2 saves them; all their latents."""
    folder.mkdir()
    latents = np.random.default_rng(0).normal(size=(sum(nums), *shape)).astype(np.float16)
    begin = 0
    for k, num in enumerate(nums):
        part = slice(begin, begin + num)
        prompts = np.array([f"día {i}" for i in range(begin, begin + num)])
        torch.save(
            {"latents": latents[part], "prompts": prompts},
            folder / f"vae_latents_{k:03d}.pt",
            pickle_protocol=5,
        )
        begin += num
    return latents


def contents(folder: Path) -> dict[str, bytes]:
    """Every entry of an LMDB, read with lmdb alone."""
    environment = lmdb.open(str(folder), readonly=True, lock=False)
    with environment.begin() as txn:
        found = {bytes(key).decode(): bytes(value) for key, value in txn.cursor()}
    environment.close()
    return found


def latents_of(folder: Path) -> np.ndarray:
    found = contents(folder)
    shape = [int(n) for n in found["latents_shape"].split()]
    rows = [np.frombuffer(found[f"latents_{i}_data"], np.float16) for i in range(shape[0])]
    return np.stack(rows).reshape(shape)


def run(*arguments, device: str | None = "cpu") -> int:
    flags = ["--device", device] if device else []
    return main([str(a) for a in (*arguments, *flags)])


def run_images(source: Path, output: Path, teacher: Path, *more) -> int:
    size = () if "--resolution" in more else ("--resolution", SIZE)
    return run(source, "--output", output, "--teacher", teacher, *size, *more)


@torch.no_grad()
def encode(teacher: Path, images: list[Image.Image], noise: bool) -> np.ndarray:
    """The VAE itself, one picture at a time, float32."""
    vae = AutoencoderKL.from_pretrained(teacher / "vae").float()
    rows = []
    for i, image in enumerate(images):
        x = torch.from_numpy(np.asarray(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
        posterior = vae.encode(x).latent_dist
        z = posterior.mean
        if noise:
            z = z + posterior.std * Draws(7, 0, (i,)).normal("posterior", tuple(z.shape[1:]))
        rows.append((z - (vae.config.shift_factor or 0)) * vae.config.scaling_factor)
    return torch.cat(rows).numpy()


# ------------------------------------------------------------------------------------------ images


@pytest.mark.parametrize("noise", [True, False])
@pytest.mark.parametrize("which", ["teacher", "other_teacher"])
def test_images_become_what_the_vae_makes_of_them(tmp_path, request, which, noise):
    folder = request.getfixturevalue(which)
    source, output = write_json(tmp_path / "set", 7), tmp_path / "lmdb"
    more = ("--seed", 7) if noise else ("--mode",)
    assert run_images(source, output, folder, "--batch_size", 3, *more) == 0
    expected = encode(folder, [picture(i) for i in range(7)], noise)
    np.testing.assert_allclose(latents_of(output), expected, rtol=2e-3, atol=2e-4)  # float16
    found = contents(output)
    assert found["prompts_3_data"].decode() == "día 3" and found["prompts_shape"] == b"7"

    scaling = LatentsScaling.of_vae(folder / "vae")
    shape = expected.shape[1:]
    data = open_dataset(output, (SIZE, SIZE), shape, latents_scaling=lambda: scaling)
    assert isinstance(data, LatentsLmdb) and data.scaled and len(data) == 7
    item = data[Position(1, 0, 5)]
    np.testing.assert_allclose(item.latents.numpy(), expected[5], rtol=2e-3, atol=2e-4)
    with pytest.raises(ValueError, match="another VAE or another resolution"):
        open_dataset(output, (SIZE, SIZE), (8, 8, 8), latents_scaling=lambda: scaling)


def test_the_posterior_is_sampled_by_seed_and_place_alone(tmp_path, teacher):
    source = write_json(tmp_path / "set", 6)
    for name, *more in [
        ("a", "--batch_size", 1),
        ("b", "--batch_size", 4, "--num_workers", 1),
        ("c", "--seed", 1),
        ("mean", "--mode"),
    ]:
        assert run_images(source, tmp_path / name, teacher, *more) == 0
    a, b, c, mean = (latents_of(tmp_path / n).astype(np.float32) for n in ("a", "b", "c", "mean"))
    np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4)
    assert np.abs(a - c).mean() > 0.3 * np.abs(a - mean).mean() > 0


def test_images_are_fitted_as_in_training(tmp_path, teacher):
    """Not square, and of another size than the resolution: equal to the data set's own pictures."""
    folder = tmp_path / "set"
    folder.mkdir()
    for i, size in enumerate([(40, 30), (9, 50)]):
        picture(i, size).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a picture\nnumber {i}\n")
    lists = {"keys": ["0", "1"], "image_paths": ["0.png", "1.png"], "prompts": ["", ""]}
    (tmp_path / "data.json").write_text(
        json.dumps({**lists, "image_paths": ["set/0.png", "set/1.png"]})
    )
    output = tmp_path / "lmdb"
    assert run_images(folder, output, teacher, "--mode", "--resolution", 12, 20) == 0
    scaling = LatentsScaling.of_vae(teacher / "vae")
    data = open_dataset(
        tmp_path / "data.json", (12, 20), (4, 6, 10), latents_scaling=lambda: scaling
    )
    images = [data[Position(1, 0, i)].image for i in range(2)]
    pixels = [((x.permute(1, 2, 0) + 1) * 127.5).round().byte().numpy() for x in images]
    expected = encode(teacher, [Image.fromarray(p) for p in pixels], noise=False)
    np.testing.assert_allclose(latents_of(output), expected, rtol=2e-3, atol=2e-4)
    assert contents(output)["prompts_1_data"] == b"a picture number 1"


def test_captions_below_the_folder_and_missing_ones(tmp_path, teacher, caplog, capsys):
    folder = tmp_path / "set"
    long = f"{'e' * 240}.png"
    for i, name in enumerate(["b/1.JPG", "a/2.png", "c.webp", "d.png", long]):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(folder / name)
    (folder / "b" / "1.txt").write_text("one")
    (folder / "a" / "2.caption").write_text("two\n")
    (folder / "d.txt").write_bytes(b"\xff")
    (folder / long).with_suffix(".txt").write_text("")
    output = tmp_path / "lmdb"
    assert run_images(folder, output, teacher, "--max_unreadable", 0) == 2
    assert "3 of 5 images have no caption" in capsys.readouterr().err and not output.exists()
    assert run_images(folder, output, teacher) == 0
    found = contents(output)
    assert found["latents_shape"] == b"2 4 8 8"
    assert [found[f"prompts_{i}_data"] for i in range(2)] == [b"two", b"one"]
    assert "3 of 5 images have no caption (x.txt beside x.jpg, or a metadata" in caplog.text
    listed = (output / "skipped.txt").read_text().splitlines()
    assert listed[0] == f"{folder / 'c.webp'}\tan image without a caption"
    assert listed[1] == f"{folder / 'd.png'}\ta caption that is not text"
    assert listed[2] == f"{folder / long}\tan empty caption"


def test_a_name_that_no_file_can_have_is_said_in_short(tmp_path, teacher, caplog):
    source = write_json(tmp_path / "set", 2)
    tree = json.loads(source.read_text())
    tree["image_paths"][0] = "e" * 5000
    source.write_text(json.dumps(tree))
    assert run_images(source, tmp_path / "lmdb", teacher) == 0
    (said,) = [r.getMessage() for r in caplog.records if "skipped eee" in r.getMessage()]
    assert "File name too long" in said and len(said) < 400


@pytest.mark.parametrize("was_there", [False, True])
def test_a_first_shard_that_cannot_be_read_leaves_nothing_begun(was_there, tmp_path, capsys):
    write_shards(tmp_path / "shards", [2, 2])
    first = min((tmp_path / "shards").iterdir())
    whole, output = first.read_bytes(), tmp_path / "lmdb"
    first.write_bytes(whole[:100])
    if was_there:
        output.mkdir()
    line = [str(tmp_path / "shards"), "--output", str(output)]
    assert main(line) == 2 and "is damaged" in capsys.readouterr().err
    assert list(output.iterdir()) == [] if was_there else not output.exists()
    second = max((tmp_path / "shards").iterdir())
    first.write_bytes(whole)
    second.write_bytes(second.read_bytes()[:100])
    assert main(line) == 2 and contents(output)["conversion_progress"]  # of the first: to go on
    assert "latents_shape" not in contents(output)


def test_unreadable_images_are_skipped_and_listed_up_to_the_limit(tmp_path, teacher, capsys):
    source, output = write_json(tmp_path / "set", 10), tmp_path / "lmdb"
    for i in (2, 3, 8):
        (tmp_path / "set" / f"{i}.png").write_bytes(b"no image")
    small = ("--batch_size", 4, "--mode")
    assert run_images(source, output, teacher, *small, "--max_unreadable", 2) == 2
    assert "3 samples could not be read, --max_unreadable allows 2" in capsys.readouterr().err
    assert len((output / "skipped.txt").read_text().splitlines()) == 3
    assert "latents_shape" not in contents(output)
    with pytest.raises(ValueError, match="is not finished: go on with"):
        LatentsLmdb(output, (4, 8, 8), LatentsScaling(0.13025))
    picture(8).save(tmp_path / "set" / "8.png")  # mended: not yet passed over for good
    assert run_images(source, output, teacher, *small, "--max_unreadable", 2) == 0
    found = contents(output)
    assert found["latents_shape"] == b"8 4 8 8" and found["prompts_2_data"].decode() == "día 4"
    rows = (output / "skipped.txt").read_text().splitlines()
    assert [Path(row.split("\t")[0]).name for row in rows] == ["2.png", "3.png"]
    expected = encode(teacher, [picture(i) for i in range(10)], noise=False)
    kept = [0, 1, 4, 5, 6, 7, 8, 9]
    np.testing.assert_allclose(latents_of(output), expected[kept], rtol=2e-3, atol=2e-4)


def test_latents_that_overflow_are_skipped(tmp_path, capsys):
    """A scaling that takes every number past float16's range."""
    folder = save_vae(tmp_path / "teacher", 4, scaling_factor=1e9)
    source = write_json(tmp_path / "set", 2)
    assert run_images(source, tmp_path / "lmdb", folder) == 2
    assert "not one sample could be read" in capsys.readouterr().err
    assert (
        "latents that are not finite"
        in contents(tmp_path / "lmdb")["conversion_skipped_0"].decode()
    )


# ------------------------------------------------------------------------------------------ shards


@pytest.mark.parametrize("which", [None, "teacher"])
def test_shards_become_what_dmd2_makes_of_them(tmp_path, request, which):
    latents = write_shards(tmp_path / "shards", [3, 300, 2])
    named = ("--teacher", request.getfixturevalue(which)) if which else ()
    output = tmp_path / "lmdb"
    assert run(tmp_path / "shards", "--output", output, *named, device=None) == 0
    found = contents(output)
    assert found["latents_shape"] == b"305 4 8 8" and found["latents_scaled"] == b"1"
    for i, row in enumerate(latents):
        assert found[f"latents_{i}_data"] == row.tobytes()
        assert found[f"prompts_{i}_data"].decode() == f"día {i}"
    assert ("latents_vae_sha256" in found) == bool(which)


def test_shards_may_be_unscaled_and_of_one_file(tmp_path, teacher):
    latents = write_shards(tmp_path / "shards", [3])
    file, output = tmp_path / "shards" / "vae_latents_000.pt", tmp_path / "lmdb"
    assert run(file, "--output", output, "--teacher", teacher, "--unscaled", device=None) == 0
    data = LatentsLmdb(output, (4, 8, 8), LatentsScaling.of_vae(teacher / "vae"))
    found = data[Position(1, 0, 2)].latents
    np.testing.assert_allclose(found, latents[2].astype(np.float32) * 0.13025)


def test_bad_shards_are_errors_and_bad_rows_are_skipped(tmp_path, other_teacher, capsys):
    latents = write_shards(tmp_path / "shards", [3, 3])
    latents[1, 0, 0, 0] = np.nan
    half = b"\x00\xd8\x00\x00".decode("utf-32-le", "surrogatepass")  # half of a character
    folder, output = tmp_path / "shards", tmp_path / "lmdb"
    tree = {"latents": latents[:3], "prompts": ["a", "b", half]}
    torch.save(tree, folder / "vae_latents_000.pt", pickle_protocol=5)
    (folder / "vae_latents_001.pt").write_bytes(b"cut")
    assert run(folder, "--output", output, device=None) == 2
    assert (
        "vae_latents_001.pt is damaged: a pickle of torch cut short at 3 B"
        in capsys.readouterr().err
    )
    tree = {"latents": latents[:3, :2], "prompts": np.array(["a", "b", "c"])}
    torch.save(tree, folder / "vae_latents_001.pt", pickle_protocol=5)
    assert run(folder, "--output", tmp_path / "mixed", device=None) == 2
    assert "latents [2, 8, 8] after latents [4, 8, 8]" in capsys.readouterr().err
    (folder / "vae_latents_001.pt").unlink()
    assert run(folder, "--output", tmp_path / "one", device=None) == 0
    assert contents(tmp_path / "one")["latents_shape"] == b"1 4 8 8"
    listed = (tmp_path / "one" / "skipped.txt").read_text()
    assert "vae_latents_000.pt: row 1\tlatents that are not finite" in listed
    assert "vae_latents_000.pt: row 2\tits prompt holds half of a character" in listed
    assert run(folder, "--output", tmp_path / "x", "--teacher", other_teacher, device=None) == 2
    assert "the teacher's VAE has 16 channels" in capsys.readouterr().err


# ------------------------------------------------------------------------ interrupted, gone on with


def killed_child(action) -> int:
    """Run it in a forked process; its exit code."""
    process = multiprocessing.get_context("fork").Process(target=action)
    process.start()
    process.join(60)
    return process.exitcode


def kill_in_commit(number: int, monkeypatch) -> None:
    """SIGKILL with half of the entries of the given commit put."""
    put, count = LatentsWriter._put, 0

    def killing(self, entries):
        nonlocal count
        count += 1

        def half():
            for i, entry in enumerate(entries):
                if count == number and i >= len(entries) // 2:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield entry

        return put(self, list(entries) if count != number else half())

    monkeypatch.setattr(LatentsWriter, "_put", killing)


@pytest.mark.parametrize("kind", ["images", "shards"])
def test_killed_inside_any_commit_it_ends_as_if_uninterrupted(tmp_path, teacher, monkeypatch, kind):
    monkeypatch.setattr("senseflow.data.convert.conversion.SHARD_ROWS", 4)
    if kind == "images":
        source = write_json(tmp_path / "set", 11)
        (tmp_path / "set" / "5.png").write_bytes(b"")
        flags, device = ("--teacher", teacher, "--resolution", SIZE, "--batch_size", 3), "cpu"
    else:
        source = tmp_path / "set"
        write_shards(source, [5, 6])
        flags, device = (), None

    def to(output: Path) -> int:
        return run(source, "--output", output, *flags, device=device)

    assert to(tmp_path / "whole") == 0
    expected = contents(tmp_path / "whole")
    num_commits = 2 + 4  # the settings, four chunks, the end
    for number in range(1, num_commits + 1):
        output = tmp_path / f"killed{number}"
        for again in {number, 2}:  # killed twice: later in its second life
            with monkeypatch.context() as patch:
                kill_in_commit(again, patch)
                killed_child(lambda output=output: sys.exit(to(output)))
        assert "latents_shape" not in contents(output) or number == num_commits
        assert to(output) == 0
        assert contents(output) == expected


def test_the_command_itself_killed_goes_on(tmp_path, teacher):
    """A process of its own, killed once it has stored something."""
    source, output = write_json(tmp_path / "set", 150), tmp_path / "lmdb"
    arguments = [source, "--output", output, "--teacher", teacher, "--resolution", SIZE]
    arguments += ["--batch_size", 1, "--device", "cpu"]
    command = [PYTHON, "-m", "senseflow.data.convert", *map(str, arguments)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    until = time.monotonic() + 60
    while time.monotonic() < until and process.poll() is None:
        if (output / "data.mdb").exists() and "latents_1_data" in contents(output):
            break
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    stored = contents(output)
    assert "latents_1_data" in stored and "latents_shape" not in stored
    assert main([str(a) for a in arguments]) == 0
    assert run_images(source, tmp_path / "whole", teacher, "--batch_size", 1) == 0
    assert contents(output) == contents(tmp_path / "whole")
    assert stored.items() - contents(output).items() <= {
        ("conversion_progress", stored["conversion_progress"])
    }


def test_no_room_left_is_said_and_loses_nothing(tmp_path, teacher, capfd):
    source, output = write_json(tmp_path / "set", 40), tmp_path / "lmdb"
    small = ("--batch_size", 2)

    def without_room():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        sys.exit(run_images(source, output, teacher, *small))

    assert killed_child(without_room) == 2
    said = capfd.readouterr().err
    assert "data.mdb could not be written" in said and "MiB left" in said
    assert "rows are stored; when there is room" in said
    num = sum(key.startswith("latents_") for key in contents(output))
    assert 2 <= num < 40
    assert run_images(source, output, teacher, *small) == 0
    assert run_images(source, tmp_path / "whole", teacher, *small) == 0
    assert contents(output) == contents(tmp_path / "whole")


@pytest.mark.parametrize("free", [0, 4096, 8192, 20480, 200_000])
def test_a_disk_that_is_full_from_the_start_is_said_and_never_a_crash(tmp_path, capfd, free):
    """LMDB writes its lock file through a map, which would be a SIGBUS here: there is none."""
    write_shards(tmp_path / "shards", [900])
    with small_disk(tmp_path / "disk", "1m") as disk:
        fill(disk, free)
        words = (tmp_path / "shards", "--output", disk / "lmdb")
        assert killed_child(lambda: sys.exit(run(*words, device=None))) == 2
        said = capfd.readouterr().err.splitlines()[-1]
        assert re.search(r"lmdb/data.mdb .* be written: .*; the disk has 0 MiB left", said), said
        (disk / "fill").unlink()
        grow(disk, "4m")
        assert run(*words, device=None) == 0
        assert len(contents(disk / "lmdb")) == 2 * 900 + 5


def test_the_map_grows(tmp_path, monkeypatch):
    latents = write_shards(tmp_path / "shards", [2000])
    monkeypatch.setattr(latents_writer, "FIRST_MAP_SIZE", 2**16)
    assert run(tmp_path / "shards", "--output", tmp_path / "lmdb", device=None) == 0
    assert np.array_equal(latents_of(tmp_path / "lmdb"), latents)


def test_going_on_with_other_settings_is_refused_and_names_them(
    tmp_path, teacher, other_teacher, capsys
):
    source, output = write_json(tmp_path / "set", 3), tmp_path / "lmdb"
    assert run_images(source, output, teacher) == 0
    before = contents(output)
    for more, named in [
        (("--seed", 3), "(seed: 0 -> 3)"),
        (("--mode",), "(posterior: sample -> mode; seed: 0 -> None)"),
        (("--resolution", 32), "(resolution: [16, 16] -> [32, 32])"),
        (("--dtype", "bfloat16"), "(dtype: float32 -> bfloat16)"),
    ]:
        assert run_images(source, output, teacher, *more) == 2
        assert f"was begun with other settings {named}" in capsys.readouterr().err
    assert run_images(source, output, other_teacher) == 2
    assert "vae_sha256: " in capsys.readouterr().err
    other = write_json(tmp_path / "other", 4)
    assert run_images(other, output, teacher) == 2
    assert "other settings (files: " in capsys.readouterr().err
    assert contents(output) == before
    assert run_images(source, output, teacher, "--batch_size", 1, "--num_workers", 2) == 0
    assert contents(output) == before  # finished already


def test_an_output_that_is_something_else_is_left_alone(tmp_path, teacher, capsys):
    source = write_json(tmp_path / "set", 2)
    environment = lmdb.open(str(tmp_path / "theirs"))
    with environment.begin(write=True) as txn:
        txn.put(b"a", b"b")
    environment.close()
    assert run_images(source, tmp_path / "theirs", teacher) == 2
    assert "holds an LMDB that this program did not write" in capsys.readouterr().err
    assert contents(tmp_path / "theirs") == {"a": b"b"}
    (tmp_path / "noise").mkdir()
    (tmp_path / "noise" / "data.mdb").write_bytes(os.urandom(2**14))
    assert run_images(source, tmp_path / "noise", teacher) == 2
    assert "noise/data.mdb is not an LMDB" in capsys.readouterr().err
    assert run_images(source, source, teacher) == 2
    assert "is a file: name a folder" in capsys.readouterr().err
    assert run_images(source, source.parent, teacher) == 2  # the pictures' own folder
    assert "set has other files in it, such as " in capsys.readouterr().err
    assert sorted(f.name for f in source.parent.iterdir()) == ["0.png", "1.png", "data.json"]
    assert sorted(f.name for f in (tmp_path / "theirs").iterdir()) == ["data.mdb", "lock.mdb"]


def test_captions_as_editors_leave_them_and_nothing_waits_for_a_pipe(tmp_path, teacher):
    """A byte order mark is no part of a caption; pipes in the place of images and captions."""
    folder, output = tmp_path / "set", tmp_path / "lmdb"
    write_json(folder, 3)
    (folder / "0.txt").write_text("día", encoding="utf-8-sig")
    os.mkfifo(folder / "1.txt")
    os.mkfifo(folder / "3.png")
    assert run_images(folder, output, teacher) == 0
    found = contents(output)
    assert found["latents_shape"] == b"1 4 8 8" and found["prompts_0_data"].decode() == "día"
    names = [row.split("\t")[0] for row in (output / "skipped.txt").read_text().splitlines()]
    assert [Path(name).name for name in names] == ["1.png", "2.png"]


def test_a_second_writer_is_noticed(tmp_path):
    with LatentsWriter(tmp_path / "lmdb", {}) as first:
        with pytest.raises(ValueError, match="another process is writing"):
            LatentsWriter(tmp_path / "lmdb", {})
        chunk = latents_writer.Chunk(np.zeros((1, 4, 2, 2), np.float16), ["a"], [], [1])
        first._stored = b"what this process stored last"
        with pytest.raises(ValueError, match="another process is writing"):
            first.add(chunk)


# --------------------------------------------------------------------------------- the command line


def test_wrong_arguments_are_one_line(tmp_path, teacher, capsys):
    source, output = write_json(tmp_path / "set", 2), tmp_path / "lmdb"
    write_shards(tmp_path / "shards", [1])
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.csv").touch()
    (tmp_path / "bare").mkdir()
    (tmp_path / "unet" / "vae").mkdir(parents=True)
    (tmp_path / "unet" / "vae" / "config.json").write_text("{}")
    write_shards(tmp_path / "both", [1])
    picture(0).save(tmp_path / "both" / "0.png")
    ready = ("--teacher", teacher, "--resolution", SIZE)
    for arguments, message in [
        ((tmp_path / "nowhere", *ready), "nowhere does not exist; expected a .json"),
        ((tmp_path / "a.csv", *ready), "a.csv is a file of the type .csv; expected"),
        ((tmp_path / "empty", *ready), "empty holds neither images nor shards"),
        ((tmp_path / "both", *ready), "both holds both images and shards"),
        ((source, "--teacher", teacher), "--resolution is needed to encode images"),
        ((source, "--resolution", SIZE), "--teacher is needed to encode images"),
        ((source, *ready[:2], "--resolution", 15), "both sides must be multiples of 2"),
        ((source, *ready[:2], "--resolution", 1, 2, 3), "one side, or height and width"),
        ((source, *ready, "--batch_size", 0), "--batch_size: 0 must be from 1 to 1024"),
        ((source, *ready, "--batch_size", 10**9), "--batch_size: 1000000000 must be from 1 to"),
        ((source, *ready, "--num_workers", 10**6), "--num_workers: 1000000 must be from 1 to"),
        ((source, *ready[:2], "--resolution", 10**9), "--resolution: 1000000000 must be from 1"),
        (("/dev/null", *ready), "is a file of the type none"),
        ((source, *ready, "--max_unreadable", -1), "argument --max_unreadable: -1 must be"),
        ((source, *ready, "--unscaled"), "--unscaled is of shards"),
        ((source, *ready[2:], "--teacher", tmp_path / "bare"), "is not a diffusers folder"),
        ((source, *ready[2:], "--teacher", tmp_path / "unet"), "is not an autoencoder's"),
        ((tmp_path / "shards", *ready), "--resolution: "),
        ((source, *ready, "--device", "tpu9"), "--device tpu9 is not a device"),
    ]:
        status = status_of(main, [str(a) for a in (*arguments, "--output", output)])
        said = capsys.readouterr().err
        assert status == 2 and said.startswith("error: ") and said.count("\n") == 1, said
        assert message in said
        assert not output.exists()


def test_help_and_wrong_arguments_import_no_torch(tmp_path):
    script = (
        "import sys; from senseflow.data.convert.__main__ import main\n"
        "assert main(['nowhere', '--output', 'x']) == 2\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert 'torch' not in sys.modules and 'diffusers' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=Path.cwd()
    )
    assert "python -m senseflow.data.convert data.json --output" in done.stdout
