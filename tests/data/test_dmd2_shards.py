"""DMD2's .pt shards, saved here as DMD2 saves them; and files that pretend to be such shards."""

import io
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from senseflow.data.convert.dmd2_shards import read_shard

PROMPTS = ["a cat", "día, 雨", ""]


def latents() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(3, 4, 2, 5)).astype(np.float16)


def save(file: Path, tree: object, protocol: int = 5) -> Path:
    torch.save(tree, file, pickle_protocol=protocol)
    return file


def save_pickle(file: Path, content: bytes) -> Path:
    """A file of torch.save's form around any pickle."""
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", "3\n")
    return file


def pickled(file: Path) -> bytes:
    with zipfile.ZipFile(file) as archive:
        return archive.read(next(n for n in archive.namelist() if n.endswith("data.pkl")))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_arrays_of_any_protocol_come_back(tmp_path, protocol):
    tree = {"latents": latents(), "prompts": np.array(PROMPTS), "batch_index": 3}
    found, prompts = read_shard(save(tmp_path / "a.pt", tree, protocol))
    assert found.dtype == np.float16 and np.array_equal(found, latents())
    assert prompts == PROMPTS


def test_arrays_in_other_orders_and_as_numpy_1_named_things(tmp_path):
    tree = {"latents": np.asfortranarray(latents()), "prompts": np.array(PROMPTS)}
    for protocol in (2, 5):
        assert np.array_equal(read_shard(save(tmp_path / "f.pt", tree, protocol))[0], latents())
    swapped = {"latents": latents().astype(">f2"), "prompts": np.array(PROMPTS)}
    assert np.array_equal(read_shard(save(tmp_path / "b.pt", swapped))[0], latents())
    content = pickled(save(tmp_path / "a.pt", tree, 2)).replace(b"numpy._core.", b"numpy.core.")
    assert b"numpy.core." in content
    found, prompts = read_shard(save_pickle(tmp_path / "old.pt", content))
    assert np.array_equal(found, latents()) and prompts == PROMPTS


def test_shards_of_tensors_and_lists_are_read_too(tmp_path):
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        tensor = torch.from_numpy(latents()).to(dtype)
        file = save(tmp_path / "a.pt", {"latents": tensor, "prompts": PROMPTS}, 2)
        found, prompts = read_shard(file)
        assert np.array_equal(found, tensor.float().numpy()) and prompts == PROMPTS


class Touch:
    """A pickle that would make a file when executed."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("beside", ["array", "tensor"])
def test_a_malicious_shard_is_refused_and_not_executed(tmp_path, protocol, beside):
    good = latents() if beside == "array" else torch.zeros(3, 4, 2, 5)
    for i, tree in enumerate(
        [
            Touch(tmp_path / "made"),
            {"latents": good, "prompts": Touch(tmp_path / "made")},
            OrderedDict(latents=good, prompts=Touch(tmp_path / "made")),
            {"latents": np.array([Touch(tmp_path / "made")], object), "prompts": PROMPTS},
        ]
    ):
        file = save(tmp_path / f"evil{i}.pt", tree, protocol)
        with pytest.raises(ValueError, match=f"evil{i}.pt is damaged or not a shard"):
            read_shard(file)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cnumpy\ndtype\n(S'O8'\nI00\nI01\ntR.",  # objects out of bytes
        b"cnumpy._core.numeric\n_frombuffer\n(C\x01xS'f2'\n(I1\ntS'C'\ntR.",
        b"c_codecs\nencode\n(S'x'\nS'rot13'\ntR.",
        b"cnumpy\ndtype\n(S'f2'\ntR(I3\nS'?'\ntb.",
        b"(lp0\n0g5\n.",
        b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x7f.",  # 9 EB of bytes
        b"",
        b".",
    ],
)
def test_arbitrary_pickles_are_refused(tmp_path, content):
    with pytest.raises(ValueError, match=r"odd.pt is damaged or not a shard of DMD2"):
        read_shard(save_pickle(tmp_path / "odd.pt", content))


def test_an_array_with_fewer_bytes_than_its_shape_is_refused(tmp_path):
    content = pickled(save(tmp_path / "a.pt", {"latents": latents(), "prompts": PROMPTS}, 2))
    assert b"K\x03K\x04K\x02K\x05t" in content  # the shape
    content = content.replace(b"K\x03K\x04K\x02K\x05t", b"K\x03K\xffK\xffK\x05t")
    with pytest.raises(ValueError, match="cannot reshape array"):
        read_shard(save_pickle(tmp_path / "odd.pt", content))


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ([1, 2], "holds a list, not latents, prompts"),
        ({"images": 1, "prompts": []}, r"holds the keys \['images', 'prompts'\]"),
        ({"latents": [1.0], "prompts": ["a"]}, "latents are list, not numbers"),
        ({"latents": np.zeros((3, 4), np.float16), "prompts": PROMPTS}, r"are float16 \[3, 4\]"),
        ({"latents": latents(), "prompts": "abc"}, "prompts are str, not a list of texts"),
        ({"latents": latents(), "prompts": [1, 2, 3]}, "prompts are list, not a list of texts"),
        ({"latents": latents(), "prompts": ["a"]}, "holds 3 latents and 1 prompts"),
        ({"latents": np.zeros((1, 1, 1, 1), np.int64), "prompts": ["a"]}, "array of the type 'i8'"),
    ],
)
def test_what_is_not_a_shard_is_named(tmp_path, tree, message):
    with pytest.raises(ValueError, match=f"odd.pt.*{message}"):
        read_shard(save(tmp_path / "odd.pt", tree))


def test_damaged_files_are_named(tmp_path):
    whole = save(tmp_path / "a.pt", {"latents": latents(), "prompts": PROMPTS}).read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.pt").write_text("not a shard")
    flipped = bytearray(whole)
    flipped[whole.index(b"latents") + 200] ^= 0xFF  # zip's checksum
    (tmp_path / "flipped.pt").write_bytes(flipped)
    stream = io.BytesIO()
    pickle.dump({"latents": latents(), "prompts": PROMPTS}, stream)
    (tmp_path / "bare.pt").write_bytes(stream.getvalue())
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as archive:
        archive.writestr("a.txt", "a")
    for name in ("cut", "text", "flipped", "bare", "zip", "missing"):
        with pytest.raises(ValueError, match=f"{name}.pt is "):
            read_shard(tmp_path / f"{name}.pt")
