"""Checkpoints: round trip, damage, pruning, a full disk; and the exported student."""

import json
import logging
import os
import pickle
from hashlib import sha256
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed.checkpoint as dcp
from diffusers import FluxTransformer2DModel
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from senseflow.common.ranks import start_ranks
from senseflow.config.sections import OptimizerConfig
from senseflow.engine.checkpoint import Checkpoints
from senseflow.engine.checkpoint_folders import find_checkpoint
from senseflow.engine.checkpoint_reader import OpenCheckpoint
from senseflow.engine.disk import HostGroup
from senseflow.engine.export import Layout, export_student
from senseflow.engine.parallel import shard
from senseflow.optim.trained import Trained
from senseflow.weights.filling import fill_shards

CONFIG = OptimizerConfig(lr=0.1, fake_score_lr=0.1, discriminator_lr=0.1)
RANKS = start_ranks()


def networks(seed: int, width: int = 4) -> dict[str, Trained]:
    """Two sharded networks with buffers, one step into their training."""
    torch.manual_seed(seed)
    trained = {}
    for name in ("generator", "discriminator"):
        network = nn.Sequential(spectral_norm(nn.Linear(3, width)), nn.Linear(width, 2))
        shard(network, [network[0]], RANKS.mesh)
        trained[name] = Trained.build(network, 0.1, CONFIG)
        network(torch.randn(5, 3)).square().sum().backward()
        trained[name].step()
    return trained


def values(trained: dict[str, Trained]) -> dict[str, torch.Tensor]:
    result = {}
    for name, part in trained.items():
        result |= {f"{name}.{k}": v for k, v in part.network.state_dict().items()}
        for i, state in part.optimizer.state_dict()["state"].items():
            result |= {f"{name}.{i}.{k}": v for k, v in state.items()}
    return {k: getattr(v, "full_tensor", lambda v=v: v)().clone() for k, v in result.items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert [k for k in one if not torch.equal(one[k], other[k])] == []


def test_round_trip_of_weights_buffers_and_optimizer_states(tmp_path):
    checkpoints = Checkpoints(tmp_path, 2, RANKS)
    saved = networks(0)
    folder = checkpoints.save(7, saved)
    other = networks(1)
    assert checkpoints.newest() == (7, folder)
    checkpoints.load(folder, other)
    assert_same(values(other), values(saved))
    assert any("_u" in k for k in values(saved)) and any("exp_avg_sq" in k for k in values(saved))
    assert (tmp_path / "last_iter").read_text() == "7\n"


def test_saving_before_the_first_step_leaves_the_optimizer_at_its_start(tmp_path):
    """A signal before the first generator turn: torch makes states by stepping once."""
    network = nn.Linear(2, 1)
    shard(network, [], RANKS.mesh)
    trained = {"generator": Trained.build(network, 0.1, CONFIG)}
    folder = Checkpoints(tmp_path, 0, RANKS).save(1, trained)
    other = {"generator": Trained.build(network, 0.1, CONFIG)}
    Checkpoints(tmp_path, 0, RANKS).load(folder, other)
    for part in (trained, other):
        states = part["generator"].optimizer.state.values()
        assert [float(s["step"]) for s in states] == [0.0, 0.0]


def test_what_is_written_is_not_read_again_for_its_digests(tmp_path):
    trained = networks(0, width=100_000)
    before = psutil.Process().io_counters()
    folder = Checkpoints(tmp_path, 0, RANKS).save(1, trained)
    after = psutil.Process().io_counters()
    assert after.write_chars - before.write_chars > 5e6
    assert after.read_chars - before.read_chars < 1e6
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert sorted(files) == sorted(f.name for f in folder.iterdir() if f.name != "manifest.json")
    assert all(sha256((folder / n).read_bytes()).hexdigest() == files[n] for n in files)


def test_saves_in_the_background_keep_their_host_memory(tmp_path):
    places = []

    def look(state):
        weight = state["generator"]["network"]["1.weight"].to_local()
        places.append(weight.data_ptr())

    trained = networks(0)
    with Checkpoints(tmp_path, 0, RANKS, asynchronous=True) as checkpoints:
        checkpoints.save(1, trained, after=look)
        checkpoints.save(2, trained, after=look)
    own = trained["generator"].network[1].weight.to_local().data_ptr()
    assert own not in places and len(places) == 2
    if not torch.__version__.startswith("2.11."):  # which keeps what is pinned alone
        assert places[0] == places[1]


def test_the_configurations_settings_outlive_those_of_the_checkpoint(tmp_path):
    folder = Checkpoints(tmp_path, 0, RANKS).save(1, networks(0))
    other = networks(0)
    other["generator"].optimizer.param_groups[0].update(betas=(0.0, 0.9), weight_decay=0.3)
    Checkpoints(tmp_path, 0, RANKS).load(folder, other)
    group = other["generator"].optimizer.param_groups[0]
    assert (group["betas"], group["weight_decay"]) == ((0.0, 0.9), 0.3)


def test_an_unreadable_manifest_is_damage(tmp_path, caplog):
    checkpoints, trained = Checkpoints(tmp_path, 0, RANKS), networks(0)
    good, bad = checkpoints.save(1, trained), checkpoints.save(2, trained)
    (bad / "manifest.json").write_text("")
    assert checkpoints.newest() == (1, good)
    assert "manifest.json cannot be read" in caplog.text


def test_weights_of_another_shape_are_refused():
    network = nn.Linear(2, 3)
    shard(network, [], RANKS.mesh)
    with pytest.raises(ValueError, match=r"weight is \[5, 2\] in the weights and \[3, 2\]"):
        fill_shards(network, lambda key: torch.ones(5, 2), torch.device("cpu"))


def test_keep_last_prunes_the_oldest(tmp_path):
    checkpoints, trained = Checkpoints(tmp_path, 2, RANKS), networks(0)
    for iteration in (1, 2, 3):
        checkpoints.save(iteration, trained)
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["step_0000002", "step_0000003"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_checkpoint_is_passed_over_and_said(tmp_path, caplog, damage):
    checkpoints, trained = Checkpoints(tmp_path, 0, RANKS), networks(0)
    good, bad = checkpoints.save(1, trained), checkpoints.save(2, trained)
    file = next(bad.glob("*.distcp"))
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
    file.write_bytes(data[: len(data) // 2] if damage == "truncate" else data)
    if damage == "remove":
        file.unlink()
    with caplog.at_level(logging.WARNING):
        assert checkpoints.newest() == (1, good)
    assert "step_0000002 is damaged" in caplog.text and "one before" in caplog.text


@pytest.mark.parametrize("num", [1, 3])
def test_where_all_are_damaged_the_run_stops_and_nothing_is_changed(tmp_path, caplog, num):
    """To begin anew would overwrite, and prune, what may still be mended."""
    checkpoints, trained = Checkpoints(tmp_path, 0, RANKS), networks(0)
    folders = [checkpoints.save(iteration, trained) for iteration in range(1, 1 + num)]
    for folder in folders:
        next(folder.glob("*.distcp")).unlink()
    there = sorted(tmp_path.rglob("*"))
    for find in (checkpoints.newest, lambda: find_checkpoint(tmp_path)):
        caplog.clear()
        with pytest.raises(ValueError, match="the oldest, step_0000001, is damaged too") as error:
            find()
        assert "\n" not in str(error.value) and "is missing" in str(error.value)
        assert caplog.text.count("using the one before") == num - 1
    assert sorted(tmp_path.rglob("*")) == there


def test_a_half_written_checkpoint_does_not_count(tmp_path):
    checkpoints, trained = Checkpoints(tmp_path, 0, RANKS), networks(0)
    good = checkpoints.save(1, trained)
    partial = tmp_path / "checkpoints" / ".partial"
    dcp.save({"half": torch.ones(2)}, checkpoint_id=str(partial))
    (tmp_path / "checkpoints" / "step_0000009").mkdir()  # no manifest
    assert checkpoints.newest() == (1, good)
    checkpoints.save(2, trained)
    assert not partial.exists()


def test_an_empty_run_has_no_checkpoint(tmp_path):
    assert Checkpoints(tmp_path, 2, RANKS).newest() is None


def test_a_checkpoint_of_other_networks_is_refused_by_name(tmp_path):
    checkpoints = Checkpoints(tmp_path, 0, RANKS)
    only = {"generator": networks(0)["generator"]}
    folder = checkpoints.save(1, only)
    with pytest.raises(ValueError, match=r"does not hold.*discriminator"):
        checkpoints.load(folder, networks(0))
    with pytest.raises(ValueError, match=r"does not fit this configuration"):
        checkpoints.load(folder, {"generator": networks(0, width=6)["generator"]})


def forged(folder: Path, index: object) -> Path:
    """A checkpoint with another index; its manifest may say what it likes."""
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    return folder


@pytest.mark.parametrize("named", [os.getcwd, Path, Path.touch])
@pytest.mark.parametrize("place", ["in", "as"])
def test_an_index_that_names_a_function_is_refused_wherever_it_is_read(tmp_path, named, place):
    checkpoints, trained = Checkpoints(tmp_path, 0, RANKS), networks(0)
    folder = checkpoints.save(1, trained)
    index = pickle.loads((folder / ".metadata").read_bytes())
    index.planner_data["generator"] = named
    forged(folder, index if place == "in" else named)
    for read in (OpenCheckpoint, lambda folder: checkpoints.load(folder, trained)):
        with pytest.raises(ValueError, match="which no index does") as error:
            read(folder)
        said = str(error.value)
        assert str(folder / ".metadata") in said and named.__name__ in said and "\n" not in said


def test_a_value_beside_the_tensors_that_names_a_function_is_refused(tmp_path):
    checkpoints, trained = Checkpoints(tmp_path, 0, RANKS), networks(0)
    trained["generator"].optimizer.param_groups[0]["betas"] = os.getcwd
    folder = checkpoints.save(1, trained)
    with pytest.raises(ValueError, match=r"betas: it holds more than tensors.*: posix\.getcwd$"):
        checkpoints.load(folder, networks(0))


def test_what_is_no_index_is_said(tmp_path):
    folder = Checkpoints(tmp_path, 0, RANKS).save(1, networks(0))
    with pytest.raises(ValueError, match=r"\.metadata is not the index .*: it is a dict$"):
        OpenCheckpoint(forged(folder, {"a": 1}))
    (folder / ".metadata").write_bytes(b"")
    with pytest.raises(ValueError, match=r"\.metadata is empty"):
        OpenCheckpoint(folder)


def test_a_full_disk_leaves_the_last_checkpoint_good(tmp_path, monkeypatch):
    checkpoints, trained = Checkpoints(tmp_path, 1, RANKS), networks(0)
    good = checkpoints.save(1, trained)

    def no_space(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.distributed.checkpoint.filesystem._write_item", no_space)
    with pytest.raises(OSError, match=r"step_0000002 failed: .*No space left"):
        checkpoints.save(2, trained)
    assert checkpoints.newest() == (1, good)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_0000001"]


def test_exported_student_loads_in_diffusers(tmp_path):
    sizes = dict(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 6, 6),
    )
    network = FluxTransformer2DModel(**sizes)
    expected = {k: v.clone() for k, v in network.state_dict().items()}
    with torch.device("meta"):
        component = FluxTransformer2DModel(**sizes)
    shard(network, [*network.transformer_blocks], RANKS.mesh)
    layout = Layout.plan(component, torch.float32)
    state, host = network.state_dict(), HostGroup(RANKS)
    export_student(state, layout, tmp_path / "step_1", host, lambda folder: None)
    loaded = FluxTransformer2DModel.from_pretrained(tmp_path / "step_1")
    assert_same(loaded.state_dict(), expected)
    config = json.loads((tmp_path / "step_1" / "config.json").read_text())
    assert config["_class_name"] == "FluxTransformer2DModel"
    assert [p.name for p in tmp_path.iterdir()] == ["step_1"]
