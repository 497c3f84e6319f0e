"""Measuring a folder: look at its images, judge them metric by metric, and write the results.

There are three kinds of metric, by what a model makes of images: a distance between the features of
two folders, a mean of a score per image, a diversity of the images of one prompt.
"""

import functools
import logging
import math
import operator
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import senseflow
from senseflow.common.devices import find_device
from senseflow.common.files import sha256_of
from senseflow.distill.scorers.metric import Given, Judge, Machine, Prepared, Spec
from senseflow.engine.share import Share
from senseflow.evaluate.folders import (
    ImageSet,
    Inspected,
    Picture,
    check_same_prompts,
    check_sizes,
    digest,
    inspect,
    read_folder,
    read_groups,
)
from senseflow.evaluate.metrics.frechet import FeatureStatistics, frechet_distance
from senseflow.evaluate.results import (
    Result,
    check_output,
    find_held,
    of_other_images,
    put,
    results_so_far,
)
from senseflow.evaluate.score import COLUMN, IMAGES, PROMPTS, REFERENCE, REFERENCE_PROMPTS

logger = logging.getLogger(__name__)

PACKAGES = (  # whose models and resizing the metrics use
    "torch", "torchvision", "pillow", "open_clip_torch", "transformers", "timm",
    "torch-fidelity", "torchmetrics",
)  # fmt: skip


@dataclass(frozen=True)
class Scoring:
    """What `evaluate score` is asked for."""

    name: str  # of the row
    output: Path  # the file of results
    metrics: Sequence[Spec]
    given: Given  # the flags of images and prompts, and the metrics' own
    mixed_sizes: bool
    again: bool  # what is there already, too
    device: str | None
    dtype: str
    batch_size: int
    threads: int


@dataclass(frozen=True)
class Desk:
    """How this process reads its share of the images."""

    share: Share
    batch_size: int
    threads: int

    def batches(self, pictures: Sequence[Picture]) -> list[Sequence[Picture]]:
        """This process's pictures in groups of `batch_size`, in order."""
        mine = self.share.mine(pictures)
        return [mine[i : i + self.batch_size] for i in range(0, len(mine), self.batch_size)]

    def all_of(self, work: Callable[[], list[float]]) -> list[float]:
        """What all processes find, in the order of the items."""
        return self.share.put_together(self.share.agreed(work))


@dataclass(frozen=True)
class Folder:
    """A folder's images, one hash of all that they and their prompts are, and their size."""

    images: ImageSet
    digest: str
    size: str  # width x height, or "mixed"


def score(scoring: Scoring) -> None:
    """Measure what is not there yet; raises ValueError for input that cannot be measured."""
    # first: a package that is missing is said before anything is measured
    versions = {"senseflow": senseflow.__version__, **{name: version(name) for name in PACKAGES}}
    share = Share.of_torchrun()
    machine = share.agreed(
        lambda: Machine(find_device(scoring.device, scoring.dtype), getattr(torch, scoring.dtype))
    )
    specs = list(dict.fromkeys(scoring.metrics))
    prepared = share.agreed(lambda: [spec.prepare(scoring.given) for spec in specs])
    share.of_main(lambda: check_output(scoring.output))
    desk = Desk(share, scoring.batch_size, scoring.threads)
    images, reference, notes = look(scoring, share)
    if reference and reference.digest == images.digest:
        notes.append("images and reference are the same files")
    for spec, metric in zip(specs, prepared, strict=True):
        against = reference if spec.needs == "reference" else None
        wanted = describe(scoring, spec, metric, images, against, share)
        known = share.of_main(functools.partial(find_held, scoring.output, wanted))
        if known and not scoring.again:
            if share.is_main:
                logger.info("%s, as measured before", in_words(known))
            continue
        found = measure(spec, metric, images.images, against, machine, desk)
        entry = wanted | found | {"versions": versions}
        entry["notes"] = [*(notes if against else []), *found.get("notes", [])]
        write(scoring.output, entry, share)


def look(scoring: Scoring, share: Share) -> tuple[Folder, Folder | None, list[str]]:
    """The images, the reference where a metric needs one, and what is to be said about both."""
    images, reference, notes = share.agreed(lambda: find_images(scoring))
    sets = [found for found in (images, reference) if found]
    inspected = [inspect_all(found.pictures, scoring.threads, share) for found in sets]
    if not scoring.mixed_sizes:
        share.agreed(lambda: check_sizes([file for files in inspected for file in files]))
    folders = []
    for found, files in zip(sets, inspected, strict=True):
        sizes = {file.size for file in files}
        folders.append(Folder(found, digest(files), sizes.pop() if len(sizes) == 1 else "mixed"))
    return folders[0], folders[1] if reference else None, notes


def find_images(scoring: Scoring) -> tuple[ImageSet, ImageSet | None, list[str]]:
    """Read both folders; raises ValueError for what the metrics asked for cannot do without."""
    given = scoring.given
    images = read_folder(given[IMAGES], given[PROMPTS], given[COLUMN])
    needs = {spec.needs for spec in scoring.metrics}
    if "prompts" in needs and None in images.prompts:
        raise ValueError(
            f"the prompts of {images.folder} are not known: its images have no sidecars; say "
            "--prompts_file"
        )
    if "seeds" in needs and len(images.sets) < 2:
        raise ValueError(
            f"{images.folder} holds one image per prompt: diversity needs two seeds or more, in "
            "seed_0/, seed_1/, ..."
        )
    if "reference" not in needs:
        return images, None, []
    reference = read_folder(given[REFERENCE], given[REFERENCE_PROMPTS], given[COLUMN])
    for found in (images, reference):
        if len(found.pictures) < 2:
            raise ValueError(f"{found.folder} holds one image: a distance needs two or more")
    if check_same_prompts(images, reference):
        return images, reference, []
    return images, reference, ["the prompts of images and reference were not compared"]


def inspect_all(pictures: list[Picture], threads: int, share: Share) -> list[Inspected]:
    """Hash and measure all files; raises ValueError naming one that is damaged."""

    def work() -> list[Inspected]:
        mine = share.mine(pictures)
        with ThreadPoolExecutor(threads) as pool:
            found = pool.map(inspect, mine)
            return list(tqdm(found, "check", len(mine), unit="image", disable=not share.is_main))

    return share.put_together(share.agreed(work))


def describe(
    scoring: Scoring,
    spec: Spec,
    metric: Prepared,
    images: Folder,
    reference: Folder | None,
    share: Share,
) -> Result:
    """What a result depends on: its entry without what is measured."""
    dtype = {} if spec.float32 else {"dtype": scoring.dtype}
    return {
        "name": scoring.name,
        "metric": spec.name,
        "value": math.nan,
        "num_images": len(images.images.pictures),
        "num_prompts": len(images.images.prompts),
        "images": str(images.images.folder.resolve()),
        "images_digest": images.digest,
        "image_size": images.size,
        "reference": str(reference.images.folder.resolve()) if reference else None,
        "reference_digest": reference.digest if reference else None,
        "weights": share.of_main(
            lambda: [{"file": str(f.resolve()), "sha256": sha256_of(f)} for f in metric.weights]
        ),
        "model": metric.model,
        "settings": {**metric.settings, **dtype},
    }


def write(output: Path, entry: Result, share: Share) -> None:
    """Put an entry into the file and say it."""
    share.of_main(lambda: put(output, entry))
    if not share.is_main:
        return
    logger.info("%s", in_words(entry))
    for note in entry["notes"]:
        logger.warning("  note: %s", note)
    others = of_other_images(results_so_far(output), entry)
    if others:
        logger.warning(
            "  note: %s in %s is of other images for %s: measure these again",
            entry["name"], output, ", ".join(others),
        )  # fmt: skip


def in_words(entry: Result) -> str:
    """A result in one line."""
    return (
        f"{entry['name']}: {entry['metric']} {entry['value']:.6g} ({entry['num_images']} images of "
        f"{entry['num_prompts']} prompts, {entry['model']}, {entry['preprocessing']})"
    )


def measure(
    spec: Spec,
    metric: Prepared,
    images: ImageSet,
    reference: Folder | None,
    machine: Machine,
    desk: Desk,
) -> Result:
    """Load the metric's model and judge the images: what of an entry is measured."""
    try:
        # TF32 would round the features of convolutions to 10 bits
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            judge = desk.share.agreed(lambda: metric.open(machine))
            if reference:
                found = measure_distance(spec.name, judge, images, reference.images, desk)
            elif spec.needs == "prompts":
                found = measure_mean(spec.name, judge, images, desk)
            else:
                found = measure_diversity(spec.name, judge, images, desk)
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"{spec.name}: the GPU's memory is full; say less than --batch_size {desk.batch_size}"
        ) from error
    return {"preprocessing": judge.preprocessing, **found}


def measure_distance(
    name: str, judge: Judge, images: ImageSet, reference: ImageSet, desk: Desk
) -> Result:
    """The Frechet distance between the features of two folders."""
    first = feature_statistics(name, judge, images, desk)
    second = feature_statistics(f"{name}, reference", judge, reference, desk)
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
    return {
        "value": frechet_distance(first, second),
        "num_reference": second.num,
        "num_features": width,
        "full_rank": min(first.num, second.num) > width,
        "notes": notes,
    }


def feature_statistics(title: str, judge: Judge, images: ImageSet, desk: Desk) -> FeatureStatistics:
    """Count, mean and covariance of the features of all images of a folder, on every rank."""

    def work() -> FeatureStatistics | None:
        found: FeatureStatistics | None = None
        for features in judged(title, judge, desk.batches(images.pictures), desk):
            part = FeatureStatistics.of(features)
            found = found + part if found else part
        return found

    parts = desk.share.gather(desk.share.agreed(work))
    return functools.reduce(operator.add, [part for part in parts if part])  # a rank may have none


def measure_mean(name: str, judge: Judge, images: ImageSet, desk: Desk) -> Result:
    """The mean score of a folder's images, and the standard error of the mean over prompts."""
    found = judged(name, judge, desk.batches(images.pictures), desk)
    scores = desk.all_of(lambda: [score for scores in found for score in scores.tolist()])
    num = len(images.prompts)
    per_prompt = [statistics.fmean(scores[i::num]) for i in range(num)]  # seed after seed
    return {
        "value": math.fsum(scores) / len(scores),
        "standard_error": error_over_prompts(per_prompt),
        "notes": judge.reads.notes(list(map(str, images.prompts))) if judge.reads else [],
    }


def measure_diversity(name: str, judge: Judge, images: ImageSet, desk: Desk) -> Result:
    """The mean distance between two images of one prompt, over all pairs, then over prompts."""
    found = judged(name, judge, desk.share.mine(list(zip(*images.sets, strict=True))), desk)
    distances = desk.all_of(lambda: [pairs.double().mean().item() for pairs in found])
    return {
        "value": math.fsum(distances) / len(distances),
        "num_seeds": len(images.sets),
        "standard_error": error_over_prompts(distances),
    }


def judged(
    title: str, judge: Judge, groups: Sequence[Sequence[Picture]], desk: Desk
) -> Iterator[Tensor]:
    """What a model makes of each group of images, with a bar on rank 0.

    Raises ValueError naming the first image whose value is not finite; of a pair, one of its group.
    """
    total = sum(map(len, groups))
    with tqdm(total=total, desc=title, unit="image", disable=not desk.share.is_main) as bar:
        for group, pixels in read_groups(groups, judge.load, desk.threads):
            values = judge.judge(pixels, [str(picture.prompt) for picture in group])
            finite = values.reshape(len(values), -1).isfinite().all(1).tolist()
            if not all(finite):
                file = group[finite.index(False) % len(group)].file
                raise ValueError(f"{title} of {file} is not finite: try --dtype float32")
            yield values
            bar.update(len(group))


def error_over_prompts(values: list[float]) -> float | None:
    """The standard error of a mean over prompts; none for a single prompt."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
