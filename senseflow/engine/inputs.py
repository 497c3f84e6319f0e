"""What a run reads besides its configuration, checked before a network is loaded."""

import dataclasses
from functools import partial
from pathlib import Path

import torch

from senseflow.config.config import Config, Dtype, ParallelConfig, PathsConfig
from senseflow.core.anchors import Anchors
from senseflow.core.path import Path as NoisePath
from senseflow.data.cached import Cache
from senseflow.data.dataset import open_dataset
from senseflow.data.items import Samples
from senseflow.data.latents_lmdb import LatentsScaling
from senseflow.distill.bottleneck import require_head
from senseflow.engine.caches import read_cache, warn_of_versions
from senseflow.engine.initial import (
    Choose,
    Initial,
    begun_with,
    identity,
    newest,
    open_initial,
)
from senseflow.engine.lora import check_lora
from senseflow.teachers.family import Family
from senseflow.teachers.folder import TeacherSettings, latent_shape
from senseflow.weights.fingerprint import base_fingerprint
from senseflow.weights.lora_settings import LoraSettings


def check(config: Config, family: Family) -> None:
    """What can be said about the input before any network is loaded; raises ValueError."""
    check_offload(config.parallel)
    cache = check_teacher(config, family)
    if config.adversarial.in_use == "bottleneck":
        bottleneck_of(config, family)
    if config.adversarial.in_use == "vfm":
        check_vfm_paths(config.paths, cache)
    settings, initial = teacher_settings(config), initial_of(config)
    if settings.lora:
        check_lora(config, family, settings, initial)
    else:
        begun_with(initial, "generator", family.student(settings))


def check_teacher(config: Config, family: Family) -> Cache:
    """What can be said about the teacher and the data before they are loaded; raises ValueError.

    Returns what a cache knows of the data.
    """
    settings = teacher_settings(config)
    family.require(settings)
    check_times(config, family.path(settings), family.anchors(settings, config.anchors.times))
    family.teacher(settings)
    cache = read_cache(config, family, read_data(config, settings))
    warn_of_versions(config)
    if cache.prompts is None:
        family.text_encoders(settings)
    return cache


def check_offload(parallel: ParallelConfig) -> None:
    """Raise ValueError where shards are to be kept off a device that there is not."""
    if parallel.offload != "none" and not torch.cuda.is_available():
        raise ValueError(
            f"parallel.offload: {parallel.offload} needs a GPU whose memory it saves, and there is "
            "none: use none"
        )


def check_times(config: Config, path: NoisePath, anchors: Anchors) -> None:
    """Raise ValueError for times off the path's clock, and for an ISG margin without room."""
    spans = {
        "anchors.times": (anchors.times[-1], anchors.times[0]),
        "dmd.time_range": config.dmd.time_range,
        "fake_score.time_range": config.fake_score.time_range,
    }
    if config.adversarial.in_use == "bottleneck":
        spans["adversarial.time_range"] = config.adversarial.time_range
    for name, (low, high) in spans.items():
        if low < 0 or high > path.noisiest:
            raise ValueError(
                f"{name}: {low:g} to {high:g} is not within this teacher's clock, 0 to "
                f"{path.noisiest:g}"
            )
    if config.isg.weight > 0:
        anchors.check_margin(config.isg.margin)


def check_vfm_paths(paths: PathsConfig, cache: Cache) -> None:
    """Raise ValueError for local folders and files of the VFM adversary that are not there."""
    for key in ("dinov2", "clip") if cache.clip is None else ("dinov2",):
        name, weights = getattr(paths, key), getattr(paths, f"{key}_weights")
        folder = name.removeprefix("local-dir:")
        if folder != name and not Path(folder).is_dir():
            raise ValueError(f"paths.{key} {name}: there is no such folder")
        if weights and "/" in weights and not Path(weights).is_file():
            raise ValueError(f"paths.{key}_weights {weights} is not a file")


def bottleneck_of(config: Config, family: Family) -> tuple[int, int, int]:
    """(C, h, w) that DMD2's head reads; raises ValueError where it cannot."""
    shape = family.bottleneck(teacher_settings(config))
    if shape is None:
        raise ValueError(f"adversarial.kind bottleneck: a {family.name} network has none")
    require_head(shape, config.adversarial.downsamplings, config.adversarial.norm_groups)
    return shape


def what_is_shared(
    config: Config, family: Family, dataset: Samples, cache: Cache
) -> dict[str, object]:
    """What every rank must hold alike; where it lies may differ from node to node."""
    tree = dataclasses.asdict(config)
    del tree["paths"]
    return {
        "the configuration": tree,
        "the data set": dataset.fingerprint(),
        "the teacher": base_fingerprint(Path(config.paths.pretrained_model) / family.component),
        "paths.initial": identity(Path(config.paths.initial)) if config.paths.initial else None,
        "the parts of paths.cache": cache.known,
        "torch": torch.__version__,
    }


def read_data(config: Config, settings: TeacherSettings) -> Samples:
    """The data set of a run; raises ValueError for latents that are not this teacher's."""
    return open_dataset(
        Path(config.paths.dataset),
        config.train.resolution,
        latent_shape(settings),
        crop=config.data.crop,
        seed=config.train.seed,
        max_unreadable=config.data.max_unreadable,
        latents_scaling=partial(LatentsScaling.of_vae, settings.folder / "vae"),
        latents_scaled=config.data.latents_scaled,
    )


def initial_of(config: Config, choose: Choose = newest) -> Initial:
    """What the run begins with in the teacher's place."""
    return open_initial(Path(config.paths.initial), choose) if config.paths.initial else {}


def teacher_settings(config: Config) -> TeacherSettings:
    """What the family of the teacher needs to know of a configuration."""
    paths = config.paths
    return TeacherSettings(
        folder=Path(paths.pretrained_model),
        resolution=config.train.resolution,
        max_sequence_length=config.data.max_sequence_length,
        shift=config.anchors.shift,
        compute_dtype=torch_dtype(config.precision.compute),
        vae_dtype=torch_dtype(config.precision.vae),
        student_config=Path(paths.student_config) if paths.student_config else None,
        linked=Path(paths.flux_wo_guidance_embed) if paths.flux_wo_guidance_embed else None,
        fold_guidance=config.student.fold_guidance,
        guidance=config.student.guidance,
        lora=lora_settings(config),
    )


def lora_settings(config: Config) -> LoraSettings | None:
    """The adapters of a configuration, None where student and fake score are networks."""
    lora = config.lora
    if lora.rank is None:
        return None
    alpha = lora.rank if lora.alpha is None else lora.alpha
    return LoraSettings(lora.rank, float(alpha), lora.train, lora.targets, config.train.seed)


def torch_dtype(name: Dtype) -> torch.dtype:
    """The type of a name in the configuration."""
    return torch.bfloat16 if name == "bfloat16" else torch.float32
