"""The metrics there are: a line for each, in the order of the table's columns."""

from senseflow.evaluate.metrics import (
    clip,
    diversity_clip,
    diversity_dinov2,
    diversity_lpips,
    fid_t,
    hps,
    image_reward,
    patch_fid_t,
    pick_score,
)
from senseflow.evaluate.metrics.metric import Spec

METRICS: tuple[Spec, ...] = (
    fid_t.SPEC,
    patch_fid_t.SPEC,
    clip.SPEC,
    hps.V2_1,
    hps.V2,
    pick_score.SPEC,
    image_reward.SPEC,
    diversity_lpips.SPEC,
    diversity_clip.SPEC,
    diversity_dinov2.SPEC,
)
