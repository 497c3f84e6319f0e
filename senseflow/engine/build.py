"""From a recipe and its configuration to a run: networks sharded on their device, data, export."""

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import nn

from senseflow.core.anchors import Anchors
from senseflow.core.error_curve import ErrorCurve
from senseflow.core.path import Path as NoisePath
from senseflow.data.dataset import open_dataset
from senseflow.data.items import Samples
from senseflow.data.latents_lmdb import LatentsScaling
from senseflow.data.sampler import Share, batches
from senseflow.discriminators import (
    BottleneckAdapter,
    BottleneckDiscriminator,
    VFMDiscriminator,
)
from senseflow.engine.agreement import require_equal
from senseflow.engine.checkpoint import complete_checkpoints
from senseflow.engine.config import Config, Dtype, PathsConfig
from senseflow.engine.disk import HostGroup, share_folder
from senseflow.engine.ema import Ema
from senseflow.engine.error_file import read_curve
from senseflow.engine.export import Layout, StudentExport
from senseflow.engine.initial import (
    Choose,
    Initial,
    begun_with,
    identity,
    newest,
    newest_undamaged,
    open_initial,
    reader,
)
from senseflow.engine.loop import Run
from senseflow.engine.optim import Trained
from senseflow.engine.parallel import (
    Ranks,
    fill_shards,
    join_group,
    recompute,
    shard,
    start_ranks,
)
from senseflow.models.bottleneck_classifier import (
    ClassifierHead,
    add_encoder_pass,
    require_head,
)
from senseflow.models.networks import NetworkSource, in_turn
from senseflow.models.pipeline import latent_shape
from senseflow.models.teacher import Adapter, TeacherFamily, TeacherSettings
from senseflow.models.text_encoders import text_encoders
from senseflow.models.vfm_discriminator import FrozenBackbone, Heads, PromptEncoder
from senseflow.models.weights import Stored
from senseflow.sampling.student import StudentCard, base_fingerprint
from senseflow.state import Discriminator, Distillation

logger = logging.getLogger(__name__)


def check(config: Config, family: TeacherFamily) -> None:
    """What can be said about the input before any network is loaded; raises ValueError."""
    check_teacher(config, family)
    read_error_curve(config, family)
    if config.adversarial.in_use == "bottleneck":
        bottleneck_of(config, family)
    if config.adversarial.in_use == "vfm":
        check_vfm_paths(config.paths)
    begun_with(initial_of(config), "generator", family.student(teacher_settings(config)))


def check_teacher(config: Config, family: TeacherFamily) -> None:
    """What can be said about the teacher and the data before they are loaded; raises ValueError."""
    settings = teacher_settings(config)
    family.require(settings)
    check_times(config, family.path(settings), family.anchors(settings, config.anchors.times))
    family.teacher(settings)
    text_encoders(settings.folder, settings.compute_dtype)
    read_data(config, settings)


@dataclass(frozen=True)
class Teacher:
    """A teacher on its device with its data, and no student."""

    adapter: Adapter
    anchors: Anchors
    teacher: nn.Module
    dataset: Samples
    ranks: Ranks

    @property
    def device(self) -> torch.device:
        return self.ranks.device


def prepare_teacher(config: Config, family: TeacherFamily) -> Teacher:
    """The teacher of a run alone, sharded as in training."""
    join_group()
    settings = teacher_settings(config)
    dataset = read_data(config, settings)
    require_equal(what_is_shared(config, family, dataset))
    ranks = start_ranks(config.parallel.replicas)
    build = partial(build_network, config=config, ranks=ranks)
    return Teacher(
        adapter=family.load_adapter(settings, ranks.device, build),
        anchors=family.anchors(settings, config.anchors.times),
        teacher=build(family.teacher(settings)),
        dataset=dataset,
        ranks=ranks,
    )


def prepare(config: Config, folder: Path, family: TeacherFamily) -> Run:
    """Every part of the run, sharded and on its device."""
    join_group()
    settings = teacher_settings(config)
    dataset = read_data(config, settings)
    error_curve = read_error_curve(config, family)
    require_equal({**what_is_shared(config, family, dataset), "isg.error_curve": error_curve})
    ranks = start_ranks(config.parallel.replicas)
    host = HostGroup(ranks)
    share_folder(folder, host)
    build = partial(build_network, config=config, ranks=ranks)
    adapter = family.load_adapter(settings, ranks.device, build)
    if config.parallel.activation_checkpointing:
        adapter.pipeline.vae.enable_gradient_checkpointing()
    anchors = family.anchors(settings, config.anchors.times)
    check_times(config, adapter.path, anchors)
    optimizer = config.optimizer
    initial = choose_initial(config, folder, host)
    generator, fake_score = (
        build(begun_with(initial, name, family.student(settings)))
        for name in ("generator", "fake_score")
    )
    parts = Distillation(
        config=config,
        adapter=adapter,
        anchors=anchors,
        teacher=build(family.teacher(settings)),
        generator=Trained.build(generator, optimizer.lr, optimizer),
        fake_score=Trained.build(fake_score, optimizer.fake_score_lr, optimizer),
        discriminator=build_discriminator(config, family, adapter, fake_score, ranks, initial),
        device=ranks.device,
        ema=Ema.start(generator, config.ema.decay) if config.ema.decay else None,
        error_curve=error_curve,
    )
    on_gpu = ranks.device.type == "cuda"
    data = partial(batches, dataset, share(config, ranks), config.data.num_workers, on_gpu)
    return Run(config, parts, ranks, data, export(config, family, config.precision.compute), folder)


def what_is_shared(config: Config, family: TeacherFamily, dataset: Samples) -> dict[str, object]:
    """What every rank must hold alike; where it lies may differ from node to node."""
    tree = dataclasses.asdict(config)
    del tree["paths"], tree["isg"]["error_curve"]
    return {
        "the configuration": tree,
        "the data set": dataset.fingerprint(),
        "the teacher": base_fingerprint(Path(config.paths.pretrained_model) / family.component),
        "paths.initial": identity(Path(config.paths.initial)) if config.paths.initial else None,
        "torch": torch.__version__,
    }


def read_error_curve(config: Config, family: TeacherFamily) -> ErrorCurve | None:
    """The law of ISG's mid-points, None where it is uniform; raises ValueError for a curve that is
    not this teacher's or does not cover its segments."""
    isg = config.isg
    if isg.weight == 0 or isg.midpoint == "uniform":
        return None
    assert isg.error_curve, "checked by IsgConfig"
    settings = teacher_settings(config)
    fingerprint = base_fingerprint(settings.folder / family.component)
    try:
        curve = read_curve(Path(isg.error_curve), fingerprint, family.path(settings))
        family.anchors(settings, config.anchors.times).check_curve(curve, isg.margin)
    except ValueError as error:
        raise ValueError(f"isg.error_curve {isg.error_curve}: {error}") from error
    return curve


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
    )


def torch_dtype(name: Dtype) -> torch.dtype:
    return torch.bfloat16 if name == "bfloat16" else torch.float32


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


def check_vfm_paths(paths: PathsConfig) -> None:
    """Raise ValueError for local folders and files of the VFM adversary that are not there."""
    for key in ("dinov2", "clip"):
        name, weights = getattr(paths, key), getattr(paths, f"{key}_weights")
        folder = name.removeprefix("local-dir:")
        if folder != name and not Path(folder).is_dir():
            raise ValueError(f"paths.{key} {name}: there is no such folder")
        if weights and "/" in weights and not Path(weights).is_file():
            raise ValueError(f"paths.{key}_weights {weights} is not a file")


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


def share(config: Config, ranks: Ranks) -> Share:
    """This rank's share of the global batches."""
    train = config.train
    return Share(
        train.seed,
        train.batch_size,
        train.grad_accumulation,
        ranks.rank,
        ranks.world_size,
        config.data.separate_real,
    )


def build_network(source: NetworkSource, config: Config, ranks: Ranks) -> nn.Module:
    """Shard a network on the meta device, then read its weights into the shards."""
    recompute(source.recomputed, config.parallel.activation_checkpointing)
    shard(source.network, source.blocks, ranks.mesh, torch_dtype(config.precision.compute))
    fill_shards(source.network, source.read, ranks.device)
    return source.network


def build_discriminator(
    config: Config,
    family: TeacherFamily,
    adapter: Adapter,
    fake_score: nn.Module,
    ranks: Ranks,
    initial: Initial,
) -> Discriminator | None:
    """The adversary of the configuration, its heads sharded; None when it has none."""
    if config.adversarial.in_use == "vfm":
        return build_vfm(config, ranks, initial)
    if config.adversarial.in_use == "bottleneck":
        shape = bottleneck_of(config, family)
        return build_bottleneck(config, shape, adapter, fake_score, ranks, initial)
    return None


def bottleneck_of(config: Config, family: TeacherFamily) -> tuple[int, int, int]:
    """(C, h, w) that DMD2's head reads; raises ValueError where it cannot."""
    if family.bottleneck is None:
        raise ValueError(f"adversarial.kind bottleneck: a {family.name} network has none")
    shape = family.bottleneck(teacher_settings(config))
    require_head(shape, config.adversarial.downsamplings, config.adversarial.norm_groups)
    return shape


def build_vfm(config: Config, ranks: Ranks, initial: Initial) -> VFMDiscriminator:
    """Frozen DINOv2 and CLIP text, and sharded heads."""
    settings, paths = config.adversarial, config.paths
    frozen_dtype = torch_dtype(config.precision.compute)
    try:
        backbone = FrozenBackbone(
            paths.dinov2, settings.taps, checkpoint=paths.dinov2_weights, dtype=frozen_dtype
        )
        prompt_encoder = PromptEncoder(paths.clip, paths.clip_weights, paths.clip_quick_gelu)
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"paths.dinov2 ({paths.dinov2}, {paths.dinov2_weights}) or paths.clip ({paths.clip}, "
            f"{paths.clip_weights}) cannot be loaded: {error!r}"
        ) from error
    with torch.device("meta"):
        heads = Heads(
            num_taps=backbone.num_features,
            width=backbone.width,
            text_dim=prompt_encoder.dim,
            reference=settings.reference != "none",
            virtual_batch=settings.virtual_batch,
            seed=config.train.seed,
            dtype=torch_dtype(config.precision.heads),
        ).eval()
    shard(heads, [*heads.heads], ranks.mesh, heads.dtype)
    fill_heads(heads, in_turn("heads", heads.draw()), ranks, initial)
    return VFMDiscriminator(
        backbone.to(ranks.device),
        prompt_encoder.to(ranks.device),
        Trained.build(heads, config.optimizer.discriminator_lr, config.optimizer),
    )


def build_bottleneck(
    config: Config,
    shape: tuple[int, int, int],
    adapter: Adapter,
    fake_score: nn.Module,
    ranks: Ranks,
    initial: Initial,
) -> BottleneckDiscriminator:
    """DMD2's head, sharded, and the encoder pass of the fake score that feeds it."""
    settings, seed = config.adversarial, config.train.seed
    with torch.device("meta"):
        head = ClassifierHead(shape[0], settings.downsamplings, settings.norm_groups, seed)
    shard(head, [], ranks.mesh, torch_dtype(config.precision.heads))
    fill_heads(head, in_turn("layers", head.draw()), ranks, initial)
    add_encoder_pass(fake_score)
    return BottleneckDiscriminator(
        cast(BottleneckAdapter, adapter),
        Trained.build(head, config.optimizer.discriminator_lr, config.optimizer),
    )


def fill_heads(
    heads: nn.Module, drawn: Callable[[str], Stored], ranks: Ranks, initial: Initial
) -> None:
    """Heads of the initial run if it had any, else as drawn."""
    known = initial.get("discriminator")
    fill_shards(heads, reader(known, heads, drawn) if known else drawn, ranks.device)


def initial_of(config: Config, choose: Choose = newest) -> Initial:
    """What the run begins with in the teacher's place."""
    return open_initial(Path(config.paths.initial), choose) if config.paths.initial else {}


def choose_initial(config: Config, folder: Path, host: HostGroup) -> Initial:
    """The same, checked for damage unless the run goes on from a checkpoint of its own."""
    begins = not host.on_main(lambda: complete_checkpoints(folder / "checkpoints"))
    initial = initial_of(config, partial(newest_undamaged, host=host) if begins else newest)
    if initial and begins and host.is_main:
        logger.info("beginning with %s of %s", ", ".join(initial), config.paths.initial)
    return initial


def export(config: Config, family: TeacherFamily, dtype: Dtype) -> StudentExport:
    """How the student becomes a diffusers folder, with a card of how it is to be sampled."""
    settings, base = teacher_settings(config), Path(config.paths.pretrained_model)
    anchors = family.anchors(settings, config.anchors.times)
    card = StudentCard(
        family=family.name,
        anchors=family.sampled_at(family.path(settings), anchors),
        height=config.train.resolution[0],
        width=config.train.resolution[1],
        guidance=None,
        max_sequence_length=config.data.max_sequence_length,
        base_name=base.name,
        base_fingerprint=base_fingerprint(base / family.component),
        iteration=0,
    )
    return StudentExport(Layout.plan(family.student(settings).network, torch_dtype(dtype)), card)
