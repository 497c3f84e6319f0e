"""Diversity by CLIP: how far apart the embeddings of one prompt's images are."""

from senseflow.evaluate.metrics import metric
from senseflow.evaluate.metrics.clip import MODEL, QUICK_GELU, RESIZE, WEIGHTS, source_of


def prepare(given: metric.Given) -> metric.Prepared:
    """CLIP on images made square at --clip_resize pixels, then as the model wants them."""
    source, side = source_of(given), given[RESIZE] or None

    def open_it(machine: metric.Machine) -> metric.Judge:
        from senseflow.evaluate.metrics.open_clips import Clip

        clip = Clip(source, machine)
        return metric.Judge(
            *clip.on_squares(side),
            lambda pixels, prompts: metric.cosine_distances(clip.images(pixels)),
        )

    settings = {"resize": side, **source.settings}
    return metric.Prepared(source.model, [source.weights], settings, open_it)


SPEC = metric.Spec(
    metric.Column("diversity_clip", "Diversity, CLIP"),
    about="1 - cosine of CLIP's embeddings of two images",
    needs="seeds",
    prepare=prepare,
    flags=(MODEL, WEIGHTS, QUICK_GELU, RESIZE),
)
