"""The index of a cache and its rows, against plain dictionaries."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from senseflow.cache.encoders import encode_prompts
from senseflow.cache.index import with_files
from senseflow.data.cache_index import (
    KEY_DTYPE,
    Field,
    Part,
    Shard,
    differences,
    key_of,
    keys_of,
    read_index,
    write_index,
)
from senseflow.data.cached import Cache, Rows
from senseflow.data.items import Position
from senseflow.data.json_images import JsonImages
from senseflow.weights.safetensors_writer import num_bytes, write_safetensors

FIELDS = {"a": Field((2, 3), "bfloat16"), "b": Field((), "float32")}
TEXTS = [f"prompt {i}" for i in range(20)]


def row_of(number: int) -> dict[str, torch.Tensor]:
    return {
        "a": torch.full((2, 3), number, dtype=torch.bfloat16),
        "b": torch.tensor(float(-number)),
    }


def written(folder: Path, sizes: tuple[int, ...]) -> Part:
    """TEXTS in files of these sizes."""
    shards, start = [], 0
    for number, size in enumerate(sizes):
        keys = "".join(map(key_of, TEXTS[start : start + size]))
        shards.append(Shard(f"x-{number:06d}.safetensors", keys))
        part = Part({}, {}, FIELDS, tuple(shards))
        rows = [row_of(start + i) for i in range(size)]
        tensors = [torch.stack([row[name] for row in rows]) for name in FIELDS]
        write_safetensors(folder / shards[-1].file, part.shapes(shards[-1]), iter(tensors))
        start += size
    return part


def test_every_row_is_found_and_no_other(tmp_path):
    part = written(tmp_path, (7, 1, 12))
    rows = Rows(tmp_path, part)
    for number in (19, 0, 6, 7, 8, 13):
        found = rows.read(key_of(TEXTS[number]))
        assert all(torch.equal(found[k], v[None]) for k, v in row_of(number).items())
    asked = np.array([key_of("prompt 3"), key_of("other"), key_of("prompt 19")], KEY_DTYPE)
    assert rows.places(asked).tolist() == [3, -1, 19]
    with pytest.raises(ValueError, match="has no row"):
        rows.read(key_of("other"))
    assert Rows(tmp_path, Part({}, {}, FIELDS)).places(asked).tolist() == [-1, -1, -1]


def test_a_file_is_safetensors_of_the_size_that_is_expected(tmp_path):
    part = written(tmp_path, (20,))
    (shard,) = part.shards
    file = tmp_path / shard.file
    assert file.stat().st_size == num_bytes(part.shapes(shard)) and part.row_bytes == 16
    assert part.fault(tmp_path, shard) is None
    held = load_file(file)
    assert held["a"].shape == (20, 2, 3) and held["b"][5] == -5
    file.write_bytes(file.read_bytes() + b"0")
    assert "damaged" in part.fault(tmp_path, shard)


def test_the_index_is_read_as_it_was_written(tmp_path):
    part = Part({"n": [1, 2], "m": None}, {"torch": "2"}, FIELDS, (Shard("f", key_of("x")),))
    write_index(tmp_path, {"clip": part})
    assert read_index(tmp_path) == {"clip": part}


def test_each_prompt_has_one_key():
    keys = keys_of(["b", "a", "b"])
    assert keys.tolist() == [key_of("b").encode(), key_of("a").encode()]
    assert key_of("a", "bc") != key_of("ab", "c")


def test_what_is_not_known_here_is_not_compared():
    made = {"weights": "0" * 64, "length": 12, "only there": 1}
    assert differences(made, {"weights": None, "length": 12, "only there": 1}) == []
    assert differences(made, {"weights": "1" * 64, "length": 8}) == [
        "weights: 000000000000 in the cache, 111111111111 here",
        "length: 12 in the cache, 8 here",
        "only there: 1 in the cache, none here",
    ]


def test_files_are_planned_by_size_and_a_lost_one_of_other_samples_is_given_up(tmp_path):
    wanted = keys_of(TEXTS)
    big = Part({}, {}, {"a": Field((2**25,), "float32")})  # 128 MiB per row
    assert [len(s) for s in with_files(tmp_path, "x", big, wanted, None).shards] == [2] * 10
    part = written(tmp_path, (7, 1, 12))
    (tmp_path / part.shards[0].file).unlink()
    fewer = with_files(tmp_path, "x", part, wanted[5:], None)  # lacks five of the lost file's
    assert [s.file[2:8] for s in fewer.shards] == ["000001", "000002", "000003"]
    assert fewer.shards[-1].split == [key_of("prompt 5"), key_of("prompt 6")]
    assert with_files(tmp_path, "x", part, wanted, None).shards == part.shards


def test_numbers_that_are_not_finite_name_the_prompt():
    def encode(prompt: str) -> dict[str, torch.Tensor]:
        return {"pooled": torch.tensor([[1.0, float("nan") if prompt == "odd" else 0.0]])}

    prompts = {"1": "even", "2": "odd"}
    rows = encode_prompts(encode, prompts, ["1", "2"])
    assert next(rows)["pooled"].tolist() == [1.0, 0.0]
    with pytest.raises(ValueError, match=r"'odd' is not finite; try precision.compute=float32"):
        next(rows)


def test_a_row_that_is_not_finite_names_the_sample_which_is_passed_over(tmp_path):
    """As where a disk or a copy changed its numbers: no encoder wrote them."""
    for name in "ab":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    lists = {"keys": ["a", "b"], "image_paths": ["a.png", "b.png"], "prompts": ["A", "B"]}
    (tmp_path / "data.json").write_text(json.dumps(lists))
    part = Part({}, {}, {"text": Field((2,), "float32")}, (Shard("x", key_of("A") + key_of("B")),))
    rows = torch.tensor([[1.0, torch.nan], [1.0, 2.0]])
    write_safetensors(tmp_path / "x", part.shapes(part.shards[0]), iter([rows]))
    samples = Cache(clip=Rows(tmp_path, part)).samples(
        JsonImages(tmp_path / "data.json", (8, 8)), see_images=True
    )
    found = samples[Position(iteration=1, index=0, item=0)]
    assert found.prompt == "B" and found.encoded.text.tolist() == [[1.0, 2.0]]
    why = f"row 0 of {tmp_path / 'x'} is damaged: its text is not finite"
    assert found.unreadable == [(str(tmp_path / "a.png"), why)]
