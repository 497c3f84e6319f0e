"""What is said of an adversary before anything is loaded."""

from pathlib import Path

import pytest
from short_runs import configure

from senseflow.engine.adversary import check_backbone

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
