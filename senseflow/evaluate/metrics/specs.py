"""The metrics there are: a line for each, in the order of the table's columns."""

from senseflow.distill.scorers.metric import Spec
from senseflow.distill.scorers.specs import SCORERS
from senseflow.evaluate.metrics import (
    diversity_clip,
    diversity_dinov2,
    diversity_lpips,
    fid_t,
    patch_fid_t,
)

METRICS: tuple[Spec, ...] = (
    fid_t.SPEC,
    patch_fid_t.SPEC,
    *SCORERS,
    diversity_lpips.SPEC,
    diversity_clip.SPEC,
    diversity_dinov2.SPEC,
)
