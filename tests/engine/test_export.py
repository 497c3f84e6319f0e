"""The exported student: streamed from shards, whole or absent, and what diffusers reads."""

import json
import time
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors import safe_open
from sharded import assert_same, spawn
from small_disk import fill, small_disk

from senseflow.common.ranks import Ranks, start_ranks
from senseflow.engine.disk import HostGroup
from senseflow.engine.export import Layout, export_student
from senseflow.engine.parallel import shard

SIZES = dict(
    patch_size=1,
    in_channels=3,  # a weight of 3 rows: of 4 shards one is empty
    num_layers=1,
    num_single_layers=1,
    attention_head_dim=10,
    num_attention_heads=1,
    joint_attention_dim=7,
    pooled_projection_dim=5,
    axes_dims_rope=(2, 4, 4),
    guidance_embeds=False,
)


def network() -> FluxTransformer2DModel:
    torch.manual_seed(3)
    return FluxTransformer2DModel(**SIZES)


def layout(dtype: torch.dtype, max_file_size: str | int = "10GB") -> Layout:
    with torch.device("meta"):
        return Layout.plan(FluxTransformer2DModel(**SIZES), dtype, max_file_size)


def nothing(folder: Path) -> None:
    pass


def sharded(ranks: Ranks) -> dict[str, torch.Tensor]:
    student = network()
    shard(student, [*student.transformer_blocks, *student.single_transformer_blocks], ranks.mesh)
    return student.state_dict()


@pytest.fixture(scope="module")
def alone() -> Ranks:
    """One rank, in this process."""
    return start_ranks()


def check_folder(folder: Path, dtype: torch.dtype) -> None:
    """diffusers and safetensors read the very numbers, rounded to `dtype`."""
    expected = {k: v.to(dtype) for k, v in network().state_dict().items()}
    loaded, info = FluxTransformer2DModel.from_pretrained(
        folder, dtype=dtype, output_loading_info=True
    )
    assert not any(info.values()), info
    assert_same(loaded.state_dict(), expected)
    keys = []
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            keys += opened.keys()
        length = int.from_bytes(file.read_bytes()[:8], "little")
        assert length % 8 == 0
        assert oct(file.stat().st_mode)[-3:] == "644"
    assert sorted(keys) == sorted(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_file_size", ["10GB", 8000])
def test_diffusers_reads_it_bit_for_bit(alone, tmp_path, dtype, max_file_size):
    folder = tmp_path / "student" / "step_1"
    plan = layout(dtype, max_file_size)
    export_student(sharded(alone), plan, folder, HostGroup(alone), nothing)
    check_folder(folder, dtype)
    files = sorted(folder.glob("*.safetensors"))
    if max_file_size == "10GB":
        assert [file.name for file in files] == ["diffusion_pytorch_model.safetensors"]
    else:
        index = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())
        assert len(files) > 2 and set(index["weight_map"].values()) == {f.name for f in files}
        largest = max(v.nbytes for v in network().to(dtype).state_dict().values())
        assert all(f.stat().st_size < 8000 + largest + 4000 for f in files)
    assert [p.name for p in folder.parent.iterdir()] == ["step_1"]


def students_from_shards(ranks: Ranks, folder: Path) -> None:
    """All ranks see one folder with the whole student, also over an older one of that name."""
    host, state = HostGroup(ranks), sharded(ranks)
    for _ in range(2):
        export_student(state, layout(torch.float32, 20000), folder / "one", host, nothing)
    check_folder(folder / "one", torch.float32)


def holds_no_more_than_a_tensor(ranks: Ranks, folder: Path) -> None:
    """What `whole` allocates in rank 0 is the tensor; the others keep nothing."""
    host = HostGroup(ranks)
    for value in sharded(ranks).values():
        whole = host.whole(value, torch.float32)
        assert (whole is None) == (ranks.rank != 0)
        if whole is not None:
            assert whole.untyped_storage().nbytes() == value.numel() * 4


def an_error_of_rank_0_is_everyones(ranks: Ranks, folder: Path) -> None:
    host, state = HostGroup(ranks), sharded(ranks)

    def describe(partial: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"writing .*one failed: .*No space left"):
        export_student(state, layout(torch.float32), folder / "one", host, describe)
    (folder / "file").write_text("")  # not even the first byte can be written
    began = time.monotonic()
    with pytest.raises(OSError, match=r"writing .*two failed: "):
        export_student(state, layout(torch.float32), folder / "file" / "two", host, nothing)
    assert time.monotonic() - began < 30
    export_student(state, layout(torch.float32), folder / "one", host, nothing)
    names = host.on_main(lambda: sorted(p.name for p in folder.iterdir()))
    assert names == ["file", "one"]


def test_two_ranks(tmp_path):
    spawn(
        2,
        tmp_path,
        students_from_shards,
        holds_no_more_than_a_tensor,
        an_error_of_rank_0_is_everyones,
    )


@pytest.mark.long
def test_hybrid_shards_on_four_ranks(tmp_path):
    spawn(4, tmp_path, students_from_shards, replicas=2)


@pytest.mark.long
def test_empty_shards_on_four_ranks(tmp_path):
    spawn(4, tmp_path, students_from_shards)


def test_a_full_disk_leaves_nothing_of_it(alone, tmp_path):
    with small_disk(tmp_path / "small", "1m") as disk:
        host, state = HostGroup(alone), sharded(alone)
        export_student(state, layout(torch.float32), disk / "step_1", host, nothing)
        fill(disk)
        with pytest.raises(OSError, match=r"step_2 failed: .*No space left on device"):
            export_student(state, layout(torch.float32), disk / "step_2", host, nothing)
        assert sorted(p.name for p in disk.iterdir()) == ["fill", "step_1"]
        check_folder(disk / "step_1", torch.float32)
