"""What a file that should hold weights is instead."""

import os
import pickle
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from senseflow.common.files import read_json
from senseflow.common.weights_files import fault_in, fault_of, words_of
from senseflow.distill.scorers.metric import read_tensors
from senseflow.weights.stored import component_weights, open_safetensors
from senseflow.weights.student import open_weights

LFS = """version https://git-lfs.github.com/spec/v1
oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393
size 5242880
"""
PAGE = "\n<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>\n"
SAID = {  # by what is written there
    b"": "is empty: a download that did not end",
    bytes(5000): "is nothing but zeros: a download that did not end",
    LFS.encode(): "is a pointer of Git LFS: `git lfs pull` in its folder fetches the 5.0 MiB it st",
    PAGE.encode(): "is an HTML page",
    b"GGUF\3\0\0\0" + bytes(100): "is a GGUF file, not",
    b"\x1f\x8b" + bytes(100) + b"1": "is a gzip archive: unpack it, not",
    b"half a word of text": "it begins b'half a w'",
    b"\x89PNG\r\n\x1a\n" + bytes(50): "is a picture (PNG), not",
    b"4": "is damaged: ",
}
READERS = {
    "model.safetensors": open_safetensors,
    "model.pth": open_weights,
    "model.bin": read_tensors,
    "diffusion_pytorch_model.safetensors.index.json": lambda file: component_weights(file.parent),
    "config.json": read_json,
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("content", SAID, ids=SAID.values())
def test_every_reader_says_what_a_file_is_in_one_line(content, name, tmp_path):
    if content == b"4" and name.endswith("json"):
        return  # a JSON text
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(ValueError) as error:
        READERS[name](file)
    said = str(error.value)
    assert said.startswith(f"{file} ") and SAID[content] in said and "\n" not in said
    assert "weights_only" not in said


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return {"a": torch.arange(6.0), "b": torch.ones(2, 3)}


def test_a_sound_file_has_no_fault(tensors, tmp_path):
    save_file(tensors, tmp_path / "a.safetensors")
    save_file({}, tmp_path / "none.safetensors")
    save_file(tensors, tmp_path / "noted.safetensors", {"format": "pt"})
    torch.save(tensors, tmp_path / "a.pth")
    torch.save(tensors, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "a.json").write_text(' {"a": 1}')
    assert [fault_of(file) for file in tmp_path.iterdir()] == 6 * [None]


def test_a_cut_file_is_said_with_its_sizes(tensors, tmp_path):
    file = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(2**20)}, file)
    whole = file.read_bytes()
    file.write_bytes(whole[: 2**21])
    said = f"bytes in place of {len(whole):,}"
    assert fault_of(file) == f"is damaged: a safetensors file with {2**21:,} {said}"
    file.write_bytes(whole + whole)
    assert fault_of(file) == f"is damaged: a safetensors file with {2 * len(whole):,} {said}"
    file.write_bytes(whole[:40])
    assert fault_of(file) == "is damaged: a safetensors file cut short within its header, at 40 B"
    file.write_bytes(whole[:8] + b"{" * (len(whole) - 8))
    assert fault_of(file) == "is damaged: a safetensors file whose header is none"
    torch.save(tensors, tmp_path / "a.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "a.pth").read_bytes()[:1024])
    assert fault_of(tmp_path / "cut.pth") == (
        "is damaged: a zip archive (torch.save) cut short at 1.0 KiB"
    )


def test_a_name_that_is_another_kinds_is_said(tensors, tmp_path):
    torch.save(tensors, tmp_path / "a.safetensors")
    assert fault_of(tmp_path / "a.safetensors") == ("is a pickle of torch, not a safetensors file")
    save_file(tensors, tmp_path / "a.bin")
    assert fault_of(tmp_path / "a.bin") == "is a safetensors file, not a pickle of torch"
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("model.safetensors", "")
    assert fault_of(tmp_path / "a.pth") == "is a zip archive: unpack it, not a pickle of torch"
    with tarfile.open(tmp_path / "a.pt", "w") as archive:
        archive.add(tmp_path / "a.bin", "a.bin")
    assert fault_of(tmp_path / "a.pt") == "is a tar archive: unpack it, not a pickle of torch"
    os.mkfifo(tmp_path / "b.pth")  # which would be waited for
    assert fault_of(tmp_path / "b.pth") == fault_of(tmp_path) == "is not a file"


@pytest.mark.parametrize("named", [os.getcwd, Path])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_of_more_than_tensors_is_told_by_what_it_names(named, zipped, tmp_path):
    """And torch's advice to read it all the same is not passed on."""
    file = tmp_path / "more.pth"
    torch.save({"model": {}, "more": named}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(pickle.UnpicklingError) as error:
        torch.load(file, weights_only=True)
    name = f"{named.__module__}.{named.__qualname__}"
    words = f"it holds more than tensors, which is not read: {name}"
    assert words_of(error.value) == words
    assert fault_in(file, error.value) == f"cannot be read: {words}"
    for reader in (open_weights, read_tensors):
        with pytest.raises(ValueError, match=rf"more\.pth .*more than tensors.*: {name}$"):
            reader(file)
