"""Diversity by CLIP: how far apart the embeddings of one prompt's images are."""

from senseflow.evaluate.metrics.clip import MODEL, QUICK_GELU, RESIZE, WEIGHTS, source_of
from senseflow.evaluate.metrics.metric import (
    Column,
    Comparer,
    Given,
    Machine,
    Prepared,
    Spec,
    cosine_distances,
    square,
    square_in_words,
)


def prepare(given: Given) -> Prepared:
    """Preprocessed as for the CLIP score."""
    source, side = source_of(given), given[RESIZE] or None

    def open_it(machine: Machine) -> Comparer:
        from senseflow.evaluate.metrics.open_clips import Clip, in_words

        clip = Clip(source, machine)
        return Comparer(
            f"{square_in_words(side)}, {in_words(clip.config)}",
            lambda picture: clip.transform(square(picture, side)),
            lambda pixels: cosine_distances(clip.images(pixels)),
        )

    settings = {"resize": side, **source.settings}
    return Prepared(source.model, [source.weights], settings, open_it)


SPEC = Spec(
    Column("diversity_clip", "Diversity, CLIP"),
    about="1 - cosine of CLIP's embeddings of two images",
    needs="seeds",
    prepare=prepare,
    flags=(MODEL, WEIGHTS, QUICK_GELU, RESIZE),
)
