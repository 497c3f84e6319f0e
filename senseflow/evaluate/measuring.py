"""The three kinds of metric over a folder, on all ranks: a distance, a mean, a diversity."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from tqdm import tqdm

from senseflow.engine.share import Share
from senseflow.evaluate.folders import ImageSet, Picture, Reader
from senseflow.evaluate.metrics.frechet import FeatureStatistics, frechet_distance
from senseflow.evaluate.metrics.metric import Comparer, Extractor, Scorer

Batches = Iterable[tuple[Sequence[Picture], Tensor]]


@dataclass(frozen=True)
class Measured:
    """A value, how its images were preprocessed, and what is to be said beside it."""

    value: float
    preprocessing: str
    extra: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def entry(self) -> dict[str, Any]:
        """Its fields in the file of results."""
        return {"value": self.value, "preprocessing": self.preprocessing, **self.extra}


def measure_distance(
    name: str,
    extractor: Extractor,
    images: ImageSet,
    reference: ImageSet,
    reader: Reader,
    share: Share,
) -> Measured:
    """The Frechet distance between the features of two folders."""
    first = feature_statistics(name, extractor, images, reader, share)
    second = feature_statistics(f"{name}, reference", extractor, reference, reader, share)
    width = len(first.total)
    notes = []
    for folder, found in ((images.folder, first), (reference.folder, second)):
        if found.num <= width:
            notes.append(
                f"{found.num} images of {folder} are too few for a covariance of full rank in "
                f"{width} features: the value is biased, compare it at equal N only"
            )
    if first.num != second.num:
        notes.append(f"{first.num} images against {second.num} of the reference")
    extra = {"num_reference": second.num, "num_features": width}
    extra["full_rank"] = min(first.num, second.num) > width
    distance = frechet_distance(first, second)
    return Measured(distance, extractor.preprocessing, extra, notes)


def feature_statistics(
    title: str, extractor: Extractor, images: ImageSet, reader: Reader, share: Share
) -> FeatureStatistics:
    """Of all images of a folder, on every rank."""

    def work() -> FeatureStatistics | None:
        pictures = share.mine(images.pictures)
        found: FeatureStatistics | None = None
        for batch, pixels in progress(
            reader.batches(pictures, extractor.load), pictures, title, share
        ):
            features = extractor.features(pixels)
            check_finite(batch, features.flatten(1).sum(1), title)
            found = found or FeatureStatistics.empty(features.shape[1])
            found.update(features)
        return found

    parts = [part for part in share.gather(share.agreed(work)) if part]  # a rank may have no image
    whole = parts[0]
    for part in parts[1:]:
        whole = whole.merge(part)
    return whole


def measure_mean(
    name: str, scorer: Scorer, images: ImageSet, reader: Reader, share: Share
) -> Measured:
    """The mean score of a folder's images, and the standard error of the mean over prompts."""

    def work() -> list[float]:
        pictures = share.mine(images.pictures)
        found: list[float] = []
        for batch, pixels in progress(reader.batches(pictures, scorer.load), pictures, name, share):
            scores = scorer.score(pixels, [str(picture.prompt) for picture in batch])
            check_finite(batch, scores, name)
            found += scores.tolist()
        return found

    scores = share.put_together(share.agreed(work))
    num = len(images.prompts)
    per_prompt = [statistics.fmean(scores[i::num]) for i in range(num)]  # seed after seed
    return Measured(
        math.fsum(scores) / len(scores), scorer.preprocessing, spread_over_prompts(per_prompt)
    )


def measure_diversity(
    name: str, comparer: Comparer, images: ImageSet, reader: Reader, share: Share
) -> Measured:
    """The mean distance between two images of one prompt, over all pairs, then over prompts."""

    def work() -> list[float]:
        groups = share.mine(list(zip(*images.sets, strict=True)))
        found = []
        for group, pixels in progress(reader.groups(groups, comparer.load), groups, name, share):
            distance = comparer.distances(pixels).double().mean()
            check_finite(group, distance[None], name)
            found.append(distance.item())
        return found

    distances = share.put_together(share.agreed(work))
    extra = {"num_seeds": len(images.sets), **spread_over_prompts(distances)}
    return Measured(math.fsum(distances) / len(distances), comparer.preprocessing, extra)


def spread_over_prompts(values: list[float]) -> dict[str, float | None]:
    """The standard error of a mean over prompts; none for a single prompt."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"standard_error": error}


def check_finite(batch: Sequence[Picture], values: Tensor, name: str) -> None:
    """Raise ValueError naming the first image whose value is not a number."""
    finite = values.isfinite().tolist()
    if not all(finite):
        file = batch[finite.index(False)].file
        raise ValueError(f"{name} of {file} is not finite: try --dtype float32")


def progress(batches: Batches, items: Sequence[Any], title: str, share: Share) -> Batches:
    """A bar on rank 0, which counts images, or prompts for a diversity."""
    unit = "image" if items and isinstance(items[0], Picture) else "prompt"
    with tqdm(total=len(items), desc=title, unit=unit, disable=not share.is_main) as bar:
        for batch, pixels in batches:
            yield batch, pixels
            bar.update(len(batch) if unit == "image" else 1)
