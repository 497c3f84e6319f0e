"""What a run reads besides its configuration: opened once, checked, and not loaded.

Launcher, process, cache, plan and xi(t) read it by the same functions, so that what one of them
accepts the others do. Reads JSON, lists, shapes and fingerprints: torch, no diffusers.
"""

import dataclasses
import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from senseflow.common.weights_files import fault_of
from senseflow.config.config import Config
from senseflow.config.load import require_no_images
from senseflow.config.sections import PathsConfig
from senseflow.config.teacher import teacher_settings
from senseflow.core.adversarial import omega
from senseflow.core.anchors import Anchors
from senseflow.core.path import Path as NoisePath
from senseflow.data.cached import Cache
from senseflow.data.dataset import open_dataset
from senseflow.data.items import Samples
from senseflow.data.latents_lmdb import LatentsScaling
from senseflow.data.prompt_list import PromptList
from senseflow.distill.bottleneck import require_head
from senseflow.engine.caches import read_cache, warn_of_versions
from senseflow.teachers.family import Family
from senseflow.teachers.folder import TeacherSettings
from senseflow.weights.fingerprint import base_fingerprint

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Setup:
    """What a configuration says of its teacher and its student."""

    config: Config
    family: Family
    settings: TeacherSettings
    path: NoisePath
    anchors: Anchors

    @property
    def fingerprint(self) -> str:
        """A sha256 of the names, sizes and ends of the teacher's weights files, in hexadecimal."""
        return base_fingerprint(self.settings.folder / self.family.component)

    def with_data(self, data: Samples, cache: Cache) -> "Inputs":
        """This setup, and what it is trained on."""
        return Inputs(self.config, self.family, self.settings, self.path, self.anchors, data, cache)


@dataclass(frozen=True)
class Inputs(Setup):
    """A setup with the data it is trained on and what a cache knows of them."""

    data: Samples
    cache: Cache  # what is known of the data without running an encoder


def read_setup(config: Config, family: Family) -> Setup:
    """Open the teacher's folder; raises ValueError for a configuration that does not fit it."""
    settings = teacher_settings(config)
    family.require(settings)
    for caution in family.cautions(settings.folder):
        logger.warning("paths.pretrained_model %s", caution)
    for name, part in (("dmd", config.dmd), ("isg", config.isg)):
        if part.weight > 0:
            family.require_guidance(f"{name}.guidance", part.guidance[0])
    path, anchors = family.path(settings), family.anchors(settings, config.anchors.times)
    check_times(config, path, anchors)
    return Setup(config, family, settings, path, anchors)


def read_inputs(config: Config, family: Family) -> Inputs:
    """Open teacher, data and cache; raises ValueError for what does not fit together."""
    setup = read_setup(config, family)
    data = open_dataset(
        Path(config.paths.dataset),
        config.train.resolution,
        family.latent_shape(setup.settings),
        crop=config.data.crop,
        seed=config.train.seed,
        max_unreadable=config.data.max_unreadable,
        latents_scaling=partial(LatentsScaling.of_vae, setup.settings.folder / "vae"),
        latents_scaled=config.data.latents_scaled,
    )
    cache = read_cache(config, family, data)
    warn_of_versions(config)
    return setup.with_data(data, cache)


def read_run(config: Config, family: Family) -> Inputs:
    """The inputs of training, which asks more of them than other commands; raises ValueError."""
    inputs = read_inputs(config, family)
    if isinstance(inputs.data, PromptList):
        require_no_images(config)
    if config.adversarial.in_use == "bottleneck":
        bottleneck_of(inputs)
    if config.adversarial.in_use == "vfm":
        check_vfm_paths(config.paths, inputs.cache)
    return inputs


def check_offload(offload: str, num_gpus: int) -> None:
    """Raise ValueError where shards are to be kept off a device that there is not."""
    if offload != "none" and num_gpus == 0:
        raise ValueError(
            f"parallel.offload: {offload} needs a GPU whose memory it saves, and there is none: "
            "use none"
        )


def check_times(config: Config, path: NoisePath, anchors: Anchors) -> None:
    """Raise ValueError for times off the path's clock, an ISG margin without room, and an adversary
    that plays at no anchor."""
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
    least = config.adversarial.least_omega
    if config.adversarial.in_use == "vfm" and least > 0:  # 0: at the top anchor alone it is out
        omegas = omega(path, torch.tensor(anchors.times), config.adversarial.omega_power)
        if (most := float(omegas.max())) <= least:
            raise ValueError(
                f"adversarial.least_omega {least:g}: the adversary would play at no anchor, as the "
                f"largest omega is {most:.3g}"
            )


def check_vfm_paths(paths: PathsConfig, cache: Cache) -> None:
    """Raise ValueError for local folders and files of the VFM adversary that are not there."""
    named = [("dinov2", paths.dinov2, paths.dinov2_weights)]
    if cache.clip is None:
        named.append(("clip", paths.clip, paths.clip_weights))
    for key, name, weights in named:
        folder = name.removeprefix("local-dir:")
        if folder != name and not Path(folder).is_dir():
            raise ValueError(f"paths.{key} {name}: there is no such folder")
        if weights and "/" in weights and (fault := fault_of(Path(weights))):
            raise ValueError(f"paths.{key}_weights {weights} {fault}")


def bottleneck_of(setup: Setup) -> tuple[int, int, int]:
    """(C, h, w) that DMD2's head reads; raises ValueError where it cannot."""
    shape, adversary = setup.family.bottleneck(setup.settings), setup.config.adversarial
    if shape is None:
        raise ValueError(f"adversarial.kind bottleneck: a {setup.family.name} network has none")
    require_head(shape, adversary.downsamplings, adversary.norm_groups)
    return shape


def what_is_shared(inputs: Inputs) -> dict[str, object]:
    """What every rank must hold alike; where it lies may differ from node to node."""
    tree = dataclasses.asdict(inputs.config)
    del tree["paths"]
    return {
        "the configuration": tree,
        "the data set": inputs.data.fingerprint(),
        "the teacher": inputs.fingerprint,
        "the parts of paths.cache": inputs.cache.known,
        "torch": torch.__version__,
    }
