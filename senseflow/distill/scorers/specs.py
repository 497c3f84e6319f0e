"""The metrics that score an image and its prompt: what can be a reward too."""

from senseflow.distill.scorers import aesthetic, clip, hps, image_reward, pick_score
from senseflow.distill.scorers.metric import Spec

SCORERS: tuple[Spec, ...] = (
    clip.SPEC,
    hps.V2_1,
    hps.V2,
    pick_score.SPEC,
    image_reward.SPEC,
    aesthetic.SPEC,
)
