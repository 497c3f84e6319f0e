"""Diversity by CLIP: how far apart the embeddings of one prompt's images are."""

from senseflow.distill.scorers import metric
from senseflow.distill.scorers.clip import MODEL, QUICK_GELU, RESIZE, WEIGHTS, prepare_clip


def prepare(given: metric.Given) -> metric.Prepared:
    """CLIP on images made square at --clip_resize pixels, then as the model wants them."""
    return prepare_clip(
        given, {}, lambda clip, pixels, prompts: metric.cosine_distances(clip.images(pixels))
    )


SPEC = metric.Spec(
    metric.Column("diversity_clip", "Diversity, CLIP"),
    about="1 - cosine of CLIP's embeddings of two images",
    needs="seeds",
    prepare=prepare,
    flags=(MODEL, WEIGHTS, QUICK_GELU, RESIZE),
)
