"""Latents in DMD2's LMDB, written here with lmdb itself: what is read, and what damage is named."""

import logging
import multiprocessing
import os
import pickle
import shutil
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch

from senseflow.data.dataset import open_dataset
from senseflow.data.items import Position, UnreadableImagesError
from senseflow.data.json_images import JsonImages
from senseflow.data.latents_lmdb import LatentsLmdb, LatentsScaling
from senseflow.data.sampler import Share, batches, item_at
from senseflow.tiny.pictures import write_dataset

SHAPE = (4, 2, 6)
SCALING = LatentsScaling(factor=0.13025)


def rows(num: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(num, *SHAPE)).astype(np.float16)


def prompt(i: int) -> str:
    return f"día {i}, 雨"


def write_dmd2(folder: Path, latents: np.ndarray, **changes: bytes | None) -> Path:
    """As DMD2 writes it; `changes` replaces entries, or leaves them out for None."""
    entries = {
        "latents_shape": " ".join(map(str, latents.shape)).encode(),
        "prompts_shape": str(len(latents)).encode(),
    }
    for i, row in enumerate(latents):
        entries[f"latents_{i}_data"] = row.tobytes()
        entries[f"prompts_{i}_data"] = prompt(i).encode()
    entries.update(changes)
    folder.mkdir(exist_ok=True)
    environment = lmdb.open(str(folder), map_size=2**28)
    with environment.begin(write=True) as txn:
        for key, value in entries.items():
            if value is not None:
                txn.put(key.encode(), value)
    environment.close()
    return folder


def read(folder: Path, **changes) -> LatentsLmdb:
    return LatentsLmdb(folder, **{"shape": SHAPE, "scaling": SCALING, **changes})


def at(item: int) -> Position:
    return Position(iteration=1, index=3, item=item)


def test_every_row_comes_back_as_float32_with_its_prompt(tmp_path):
    latents = rows(12)
    data = read(write_dmd2(tmp_path / "lmdb", latents))
    assert len(data) == 12
    for i in range(12):
        item = data[at(i)]
        assert item.latents.dtype == torch.float32 and item.image is None
        assert torch.equal(item.latents, torch.from_numpy(latents[i].astype(np.float32)))
        assert (item.prompt, item.index, item.unreadable) == (prompt(i), 3, [])


def test_what_dmd2_wrote_is_scaled_already_and_the_configuration_may_say_otherwise(tmp_path):
    latents = rows(2)
    folder = write_dmd2(tmp_path / "lmdb", latents)
    raw = read(folder, scaled=False, scaling=LatentsScaling(factor=0.3611, shift=0.1159))
    expected = (torch.from_numpy(latents[1].astype(np.float32)) - 0.1159) * 0.3611
    torch.testing.assert_close(raw[at(1)].latents, expected)
    assert torch.equal(read(folder, scaled=True)[at(1)].latents, read(folder)[at(1)].latents)


def test_what_the_lmdb_says_of_its_scaling_and_vae_is_followed(tmp_path, caplog):
    known = {
        "latents_scaled": b"0",
        "latents_scaling_factor": b"0.13025",
        "latents_shift_factor": b"0.0",
        "latents_vae_sha256": b"abc",
    }
    latents = rows(2)
    folder = write_dmd2(tmp_path / "lmdb", latents, **known)
    torch.testing.assert_close(
        read(folder)[at(0)].latents, torch.from_numpy(latents[0].astype(np.float32)) * 0.13025
    )
    with pytest.raises(ValueError, match="says that its latents are not scaled"):
        read(folder, scaled=True)
    with pytest.raises(ValueError, match=r"VAE with scaling factor 0.13025, the teacher's has 0.3"):
        read(folder, scaling=LatentsScaling(factor=0.3))
    with pytest.raises(ValueError, match=r"VAE with shift 0.0, the teacher's has 0.1"):
        read(folder, scaling=LatentsScaling(factor=0.13025, shift=0.1))
    with caplog.at_level(logging.WARNING):
        read(folder, scaling=LatentsScaling(factor=0.13025, vae_sha256="abc"))
        assert not caplog.records
        read(folder, scaling=LatentsScaling(factor=0.13025, vae_sha256="def"))
    assert "right only if it is the same VAE" in caplog.text


def test_latents_that_look_unscaled_are_warned_of_unless_someone_said(tmp_path, caplog):
    folder = write_dmd2(tmp_path / "lmdb", rows(2) * np.float16(7.7))
    read(folder, scaled=True), read(folder, scaled=False)
    read(write_dmd2(tmp_path / "usual", rows(2)))
    assert not caplog.records
    read(folder)
    assert "does not say whether its latents are scaled" in caplog.text


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_of_latents_from_any_number_of_workers(tmp_path, num_workers):
    latents = rows(10)
    data = read(write_dmd2(tmp_path / "lmdb", latents))
    part = Share(seed=5, batch_size=4, grad_accumulation=2, separate_real=True)
    iterations = batches(data, part, num_workers, pin_memory=False, start=3)
    found = [next(iterations) for _ in range(3)]
    iterations.close()
    for iteration, micros in enumerate(found, start=3):
        assert [m.indices for m in micros] == [[0, 1], [2, 3]]
        for micro in micros:
            for batch, separate in ((micro, False), (micro.real, True)):
                assert batch.images is None and batch.latents.shape == (2, *SHAPE)
                for k, index in enumerate(batch.indices):
                    item = item_at(5, (iteration - 1) * 4 + index, 10, separate)
                    expected = torch.from_numpy(latents[item].astype(np.float32))
                    assert batch.prompts[k] == prompt(item)
                    assert torch.equal(batch.latents[k], expected)


def test_fingerprints_tell_data_sets_apart_and_not_their_folders(tmp_path):
    one, more, other = rows(40), rows(41), rows(40)
    other[0, 0, 0, 0] += 1
    folders = [write_dmd2(tmp_path / str(i), r) for i, r in enumerate((one, one, more, other))]
    found = [read(folder).fingerprint() for folder in folders]
    assert found[0] == found[1] and len(set(found)) == 3


def test_a_data_set_lives_through_pickling_and_a_fork(tmp_path):
    """Open as it is."""
    data = read(write_dmd2(tmp_path / "lmdb", rows(6)))
    here = [data[at(i)] for i in range(6)]
    again = pickle.loads(pickle.dumps(data))
    assert torch.equal(again[at(5)].latents, here[5].latents)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        there = pool.map(data.__getitem__, [at(i) for i in range(6)])
    for a, b in zip(here, there, strict=True):
        assert a.prompt == b.prompt and torch.equal(a.latents, b.latents)


def test_one_process_may_open_a_folder_twice_and_a_read_only_one(tmp_path):
    folder = write_dmd2(tmp_path / "lmdb", rows(3))
    (folder / "lock.mdb").unlink()
    os.chmod(folder / "data.mdb", 0o444)
    os.chmod(folder, 0o555)
    first, second = read(folder), read(folder)
    assert torch.equal(first[at(2)].latents, second[at(2)].latents)
    assert os.listdir(folder) == ["data.mdb"]
    os.chmod(folder, 0o755)


def test_a_file_cut_short_anywhere_is_named_before_it_is_mapped_past_its_end(tmp_path):
    whole = write_dmd2(tmp_path / "lmdb", rows(200)) / "data.mdb"
    content = whole.read_bytes()
    cut = tmp_path / "cut"
    cut.mkdir()
    for size in (0, 10, 4096, 5000, 8192, 20_000, len(content) - 4096, len(content) - 1):
        (cut / "data.mdb").write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"cut/data.mdb is (cut short|not an LMDB)"):
            read(cut)
    (cut / "data.mdb").write_bytes(content)
    assert len(read(cut)) == 200


def test_what_is_not_an_lmdb_of_latents_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nothing is not an LMDB: it has no data.mdb"):
        read(tmp_path / "nothing")
    (tmp_path / "noise").mkdir()
    (tmp_path / "noise" / "data.mdb").write_bytes(os.urandom(2**15))
    with pytest.raises(ValueError, match=r"noise/data.mdb is not an LMDB"):
        read(tmp_path / "noise")


LENGTH = 2 * 4 * 2 * 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latents_shape": None}, "has no latents_shape: it is not an LMDB of latents"),
        ({"latents_shape": None, "conversion": b"{}"}, "is not finished: go on"),
        ({"latents_shape": b"four"}, "latents_shape is b'four', expected four numbers"),
        ({"latents_shape": b"5 4 2"}, "latents_shape is b'5 4 2', expected four numbers"),
        ({"latents_shape": b"0 4 2 6"}, "latents_shape is b'0 4 2 6', expected"),
        (
            {"latents_shape": b"5 16 2 6"},
            r"holds latents \[16, 2, 6\], the teacher's .* are \[4, 2, 6\]: .* of another VAE or",
        ),
        ({"latents_0_data": None}, "has no latents_0_data, one of the 5 rows"),
        ({"prompts_4_data": None}, "has no prompts_4_data, one of the 5 rows"),
        ({"latents_shape": b"9 4 2 6"}, "has no latents_8_data, one of the 9 rows"),
        (
            {"latents_2_data": None, "prompts_2_data": None},
            "has 10 entries, 5 rows of latents and prompts and their shape are 11",
        ),
        (
            {"latents_4_data": bytes(LENGTH * 2)},
            f"latents_4_data has {2 * LENGTH} bytes, float16 latents .* have {LENGTH}",
        ),
    ],
)
def test_bad_contents_are_named_before_training(tmp_path, changes, message):
    folder = write_dmd2(tmp_path / "bad", rows(5), **changes)
    with pytest.raises(ValueError, match=f"bad.*{message}"):
        read(folder)


def test_rows_damaged_in_the_middle_are_named_when_read(tmp_path):
    folder = write_dmd2(tmp_path / "bad", rows(5), latents_1_data=b"12", latents_2_data=None)
    data = read(folder)
    with pytest.raises(ValueError, match="bad: latents_1_data has 2 bytes"):
        data[at(1)]
    with pytest.raises(ValueError, match="bad has no latents_2_data"):
        data[at(2)]


def test_rows_without_usable_numbers_or_text_are_replaced_and_reported(tmp_path):
    latents = rows(5)
    latents[1, 0, 0, 0], latents[2, 1, 1, 1] = np.inf, np.nan
    folder = write_dmd2(tmp_path / "bad", latents, prompts_3_data=b"\xff")
    item = read(folder)[at(1)]
    assert item.prompt == prompt(4) and torch.equal(item.latents, read(folder)[at(4)].latents)
    assert [source for source, _ in item.unreadable] == [f"{folder}: row {i}" for i in (1, 2, 3)]
    assert [reason[:12] for _, reason in item.unreadable][::2] == ["latents that", "prompt: 'utf"]
    with pytest.raises(UnreadableImagesError, match="3 of 5 images in a row"):
        read(folder, max_unreadable=2)[at(1)]


# ------------------------------------------------------------------------------------ open_dataset


def opened(path: Path):
    return open_dataset(path, (32, 32), SHAPE, latents_scaling=lambda: SCALING)


def test_open_dataset_reads_json_and_lmdb(tmp_path):
    write_dataset(tmp_path / "json", num=2, seed=0, num_prompts=2)
    assert isinstance(opened(tmp_path / "json" / "data.json"), JsonImages)
    assert isinstance(opened(write_dmd2(tmp_path / "lmdb", rows(2))), LatentsLmdb)


def test_a_vaes_weights_are_not_read_for_images(tmp_path):
    def asked():
        raise AssertionError("the scaling is for latents")

    write_dataset(tmp_path, num=2, seed=0, num_prompts=2)
    open_dataset(tmp_path / "data.json", (32, 32), SHAPE, latents_scaling=asked)


def test_open_dataset_says_what_it_found_and_what_is_expected(tmp_path):
    write_dataset(tmp_path / "json", num=2, seed=0, num_prompts=2)
    lmdb_folder = write_dmd2(tmp_path / "lmdb", rows(2))
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "vae_latents_000.pt").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.xlsx").touch()
    for path, found in [
        (tmp_path / "nowhere", "nowhere does not exist"),
        (tmp_path / "json", "json is a folder: name a file in it, such as data.json"),
        (lmdb_folder / "data.mdb", "data.mdb is the file inside an LMDB: name its folder"),
        (tmp_path / "shards", "is a folder of .pt files: convert them with"),
        (tmp_path / "empty", "is a folder with nothing in it"),
        (tmp_path / "a.xlsx", "is a file of the type .xlsx"),
    ]:
        with pytest.raises(ValueError, match=f"{found}.*; expected a .json file with keys"):
            opened(path)
    with pytest.raises(ValueError, match=r"gone.json not found"):
        opened(tmp_path / "gone.json")


def test_a_folder_rewritten_under_its_name_is_read_anew(tmp_path):
    folder = write_dmd2(tmp_path / "lmdb", rows(2))
    assert len(read(folder)) == 2
    shutil.rmtree(folder)
    assert len(read(write_dmd2(folder, rows(7)))) == 7
