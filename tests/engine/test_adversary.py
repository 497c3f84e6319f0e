"""What is said of an adversary before anything is loaded."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from short_runs import begin, configure, write_pictures

from senseflow.common.ranks import start_ranks
from senseflow.config.sections import PathsConfig
from senseflow.engine import adversary, build
from senseflow.engine.adversary import check_backbone
from senseflow.engine.disk import HostGroup

TINY = "assets/tiny/common"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("paths.dinov2=vit_large_patch14_dinov2.no", r"^paths.dinov2 .*: Invalid pretrained tag"),
        ("paths.dinov2=assets/tiny/common/dinov2", "such as .* or local-dir:FOLDER"),
        (
            "paths.dinov2=resnet18",
            "^paths.dinov2 resnet18: resnet18 is none of timm's vision transformers: a DINOv2 or",
        ),
        ("paths.dinov2=local-dir:no/where", "no/where/config.json not found"),
        (f"paths.dinov2=local-dir:{TINY}/judge", "config.json names no architecture"),
        ("adversarial.taps=[0, 6]", r"adversarial.taps must ascend within 0..5, got \[0, 6\]"),
        ("train.resolution=2", r"train.resolution \[2, 2\] is below a patch of .*, \[4, 4\]"),
    ],
)
def test_a_backbone_that_cannot_be_is_one_line(override, said):
    with pytest.raises(ValueError, match=said) as raised:
        check_backbone(configure(Path("data.json"), override))
    assert "\n" not in str(raised.value)


def test_the_embedded_backbone_can():
    check_backbone(configure(Path("data.json")))


@pytest.mark.parametrize(
    ("changes", "text_dim", "fetches"),
    [
        ({}, None, True),  # both are names
        ({"dinov2_weights": "/dino.safetensors", "clip_weights": "/clip.pt"}, None, False),
        ({"dinov2": "local-dir:/dino", "clip": "local-dir:/clip", "clip_weights": None}, 8, False),
        ({"dinov2": "local-dir:/dino"}, None, True),  # CLIP's tag
        ({"dinov2": "local-dir:/dino"}, 8, False),  # of whose features a cache knows
    ],
)
def test_names_of_far_networks_are_resolved_first(changes, text_dim, fetches, monkeypatch):
    asked = []
    monkeypatch.setattr(adversary, "load_frozen", lambda *given: asked.append(given))
    paths = replace(PathsConfig("teacher", "data.json"), **changes)
    config = replace(configure(Path("data.json")), paths=paths)
    adversary.fetch_frozen(config, text_dim)
    assert asked == ([(config, text_dim)] if fetches else [])


@pytest.mark.parametrize("local_rank", [0, 1])
def test_the_first_rank_of_a_node_acts_for_it(local_rank, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    host, done = HostGroup(start_ranks()), []
    host.on_first_of_node(lambda: done.append(1))
    assert done == [1] * (local_rank == 0)


def test_a_run_fetches_them_once_on_every_node(monkeypatch, tmp_path):
    def fetch(*given: object) -> None:
        raise FileNotFoundError("fetched")

    def act(host: HostGroup, action: Callable[[], object]) -> None:
        with pytest.raises(FileNotFoundError, match="fetched"):
            action()
        raise ValueError("on the first rank of a node")

    monkeypatch.setattr(build, "fetch_frozen", fetch)
    monkeypatch.setattr(HostGroup, "on_first_of_node", act)
    with pytest.raises(ValueError, match="on the first rank of a node"):
        begin(configure(write_pictures(tmp_path / "data")), tmp_path / "run")


def test_what_the_first_rank_of_a_node_misses_is_said():
    def miss() -> None:
        raise ValueError("not there")

    with pytest.raises(ValueError, match="not there"):
        HostGroup(start_ranks()).on_first_of_node(miss)
