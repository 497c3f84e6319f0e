"""Measuring a folder: look at its images, judge them metric by metric, and write the results."""

import argparse
import logging
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from tqdm import tqdm

import senseflow
from senseflow.common.devices import find_device
from senseflow.engine.share import Share
from senseflow.evaluate.folders import (
    ImageSet,
    Inspected,
    Reader,
    check_same_prompts,
    check_sizes,
    digest,
    inspect,
    read_folder,
    require_prompts,
)
from senseflow.evaluate.measuring import Measured, measure_distance, measure_diversity, measure_mean
from senseflow.evaluate.metrics.clip_scores import clip_metric, hps_metric
from senseflow.evaluate.metrics.diversity import clip_diversity, dinov2_diversity, lpips_diversity
from senseflow.evaluate.metrics.image_reward import image_reward_metric
from senseflow.evaluate.metrics.inception import fid_metric, patch_fid_metric
from senseflow.evaluate.metrics.metric import Machine, Metric
from senseflow.evaluate.metrics.pick_score import pick_score_metric
from senseflow.evaluate.results import (
    Result,
    check_output,
    held,
    of_other_images,
    put,
    results_so_far,
    sha256_of,
)

logger = logging.getLogger(__name__)

Make = Callable[[argparse.Namespace], Metric[Any]]
DISTANCES: dict[str, Make] = {"fid_t": fid_metric, "patch_fid_t": patch_fid_metric}
MEANS: dict[str, Make] = {
    "clip": clip_metric,
    "hps_v2": lambda args: hps_metric("hps_v2", args.hps_v2, args.hps_model),
    "hps_v2.1": lambda args: hps_metric("hps_v2.1", args.hps_v2_1, args.hps_model),
    "pick_score": pick_score_metric,
    "image_reward": image_reward_metric,
}
DIVERSITIES: dict[str, Make] = {
    "diversity_lpips": lpips_diversity,
    "diversity_clip": clip_diversity,
    "diversity_dinov2": dinov2_diversity,
}
FLOAT32 = (*DISTANCES, "diversity_lpips")  # whatever --dtype says
PACKAGES = (
    "torch", "torchvision", "pillow", "open_clip_torch", "transformers", "timm",
    "torch-fidelity", "torchmetrics",
)  # fmt: skip


@dataclass(frozen=True)
class Folder:
    """A folder's images, and what their files hold."""

    images: ImageSet
    inspected: list[Inspected]

    @property
    def digest(self) -> str:
        """Of all images and prompts."""
        return digest(self.images.pictures, self.inspected)


def score(args: argparse.Namespace) -> None:
    """Measure what is not there yet; raises ValueError for input that cannot be measured."""
    share = Share.of_torchrun()
    machine = share.agreed(lambda: Machine(find_device(args.device), getattr(torch, args.dtype)))
    makers = DISTANCES | MEANS | DIVERSITIES
    names = list(dict.fromkeys(args.metrics))
    metrics = share.agreed(lambda: [makers[name](args) for name in names])
    share.of_main(lambda: check_output(args.output))
    images, reference, notes = look(args, share)
    if reference and reference.digest == images.digest:
        notes.append("images and reference are the same files")
    for metric in metrics:
        against = reference if metric.name in DISTANCES else None
        wanted = describe(args, metric, images, against, share)
        entry = None if args.again else find_held(args, wanted, share)
        if entry:
            if share.is_main:
                logger.info("%s, as measured before", in_words(entry))
            continue
        measured = measure(args, metric, images.images, against, machine, share)
        entry = wanted | measured.entry() | {"versions": versions()}
        entry["notes"] = [*(notes if against else []), *measured.notes]
        write(args, entry, share)


def versions() -> dict[str, str]:
    """Of this package and those whose models and resizing it uses."""
    return {"senseflow": senseflow.__version__, **{name: version(name) for name in PACKAGES}}


def look(args: argparse.Namespace, share: Share) -> tuple[Folder, Folder | None, list[str]]:
    """The images, the reference where a metric needs one, and what is to be said about both."""
    images, reference, notes = share.agreed(lambda: find_images(args))
    folders = [inspect_all(found, args.threads, share) for found in (images, reference) if found]
    if not args.mixed_sizes:
        pictures = [picture for folder in folders for picture in folder.images.pictures]
        found = [one for folder in folders for one in folder.inspected]
        share.agreed(lambda: check_sizes(pictures, found))
    return folders[0], folders[1] if reference else None, notes


def find_images(args: argparse.Namespace) -> tuple[ImageSet, ImageSet | None, list[str]]:
    """Read both folders; raises ValueError for what the metrics asked for cannot do without."""
    images = read_folder(args.images, args.prompts_file)
    asked = set(args.metrics)
    if asked & MEANS.keys():
        require_prompts(images)
    if asked & DIVERSITIES.keys() and len(images.sets) < 2:
        raise ValueError(
            f"{images.folder} holds one image per prompt: diversity needs two seeds or more, in "
            "seed_0/, seed_1/, ..."
        )
    if not asked & DISTANCES.keys():
        return images, None, []
    reference = read_folder(args.reference, args.reference_prompts_file)
    for found in (images, reference):
        if len(found.pictures) < 2:
            raise ValueError(f"{found.folder} holds one image: a distance needs two or more")
    if check_same_prompts(images, reference):
        return images, reference, []
    return images, reference, ["the prompts of images and reference were not compared"]


def inspect_all(images: ImageSet, threads: int, share: Share) -> Folder:
    """Hash and measure all files; raises ValueError naming one that is damaged."""

    def work() -> list[Inspected]:
        pictures = share.mine(images.pictures)
        with ThreadPoolExecutor(threads) as pool:
            found = pool.map(inspect, pictures)
            return list(
                tqdm(found, "check", len(pictures), unit="image", disable=not share.is_main)
            )

    return Folder(images, share.put_together(share.agreed(work)))


def describe(
    args: argparse.Namespace,
    metric: Metric[Any],
    images: Folder,
    reference: Folder | None,
    share: Share,
) -> Result:
    """What a result depends on: its entry without what is measured."""
    sizes = {found.size for found in images.inspected}
    settings = dict(metric.settings)
    if metric.name not in FLOAT32:
        settings["dtype"] = args.dtype
    return {
        "name": args.name,
        "metric": metric.name,
        "value": math.nan,
        "num_images": len(images.images.pictures),
        "num_prompts": len(images.images.prompts),
        "images": str(images.images.folder.resolve()),
        "images_digest": images.digest,
        "image_size": "x".join(map(str, sizes.pop())) if len(sizes) == 1 else "mixed",
        "reference": str(reference.images.folder.resolve()) if reference else None,
        "reference_digest": reference.digest if reference else None,
        "weights": share.of_main(
            lambda: [{"file": str(f.resolve()), "sha256": sha256_of(f)} for f in metric.weights]
        ),
        "model": metric.model,
        "settings": settings,
    }


def find_held(args: argparse.Namespace, wanted: Result, share: Share) -> Result | None:
    """This very measurement, if the file has it."""
    return share.of_main(lambda: held(results_so_far(args.output), wanted))


def measure(
    args: argparse.Namespace,
    metric: Metric[Any],
    images: ImageSet,
    reference: Folder | None,
    machine: Machine,
    share: Share,
) -> Measured:
    """Load the metric's model and judge the images."""
    reader = Reader(args.batch_size, args.threads)
    try:
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            opened = share.agreed(lambda: metric.open(machine))
            if reference:
                return measure_distance(
                    metric.name, opened, images, reference.images, reader, share
                )
            if metric.name in DIVERSITIES:
                return measure_diversity(metric.name, opened, images, reader, share)
            return measure_mean(metric.name, opened, images, reader, share)
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"{metric.name}: the GPU's memory is full; say less than --batch_size {args.batch_size}"
        ) from error


def write(args: argparse.Namespace, entry: Result, share: Share) -> None:
    """Put an entry into the file and say it."""
    share.of_main(lambda: put(args.output, entry))
    if not share.is_main:
        return
    logger.info("%s", in_words(entry))
    for note in entry["notes"]:
        logger.warning("  note: %s", note)
    others = of_other_images(results_so_far(args.output), entry)
    if others:
        logger.warning(
            "  note: %s in %s is of other images for %s: measure these again",
            entry["name"], args.output, ", ".join(others),
        )  # fmt: skip


def in_words(entry: Result) -> str:
    """A result in one line."""
    return (
        f"{entry['name']}: {entry['metric']} {entry['value']:.6g} ({entry['num_images']} images of "
        f"{entry['num_prompts']} prompts, {entry['model']}, {entry['preprocessing']})"
    )
