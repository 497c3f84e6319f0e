"""SenseFlow on FLUX.1: wires the FLUX teacher to the iteration and the loop.

sh exp_flux/train_flux_senseflow.sh NODES GPUS CONFIG SAVE_DIR [key.sub=value ...]
"""

from functools import partial
from pathlib import Path

from senseflow.data.json_images import JsonImages
from senseflow.data.sampler import Share, batches
from senseflow.distill import Distillation
from senseflow.engine.build import build_discriminator, build_network, export, torch_dtype
from senseflow.engine.config import Config
from senseflow.engine.launch import main
from senseflow.engine.loop import Run, open_run_folder
from senseflow.engine.optim import Trained
from senseflow.engine.parallel import start_ranks
from senseflow.models.flux import (
    FluxAdapter,
    require_fit,
    require_flux_folder,
    student_source,
    teacher_source,
)


def check(config: Config) -> None:
    """What can be said about the input before any network is loaded; raises ValueError."""
    teacher = Path(config.paths.pretrained_model)
    require_flux_folder(teacher)
    require_fit(teacher, config.train.resolution, config.data.max_sequence_length)
    teacher_source(teacher, torch_dtype(config.precision.compute))
    _student(config)
    JsonImages(Path(config.paths.dataset), config.train.resolution)


def prepare(config: Config, folder: Path) -> Run:
    """Every part of the run, sharded and on its device."""
    ranks = start_ranks(config.parallel.replicas)
    teacher = Path(config.paths.pretrained_model)
    compute = torch_dtype(config.precision.compute)
    adapter = FluxAdapter.load(
        teacher,
        config.train.resolution,
        config.data.max_sequence_length,
        compute,
        torch_dtype(config.precision.vae),
        ranks.device,
    )
    if config.parallel.activation_checkpointing:
        adapter.pipeline.vae.enable_gradient_checkpointing()
    anchors = adapter.anchors(config.anchors.times, config.anchors.shift)
    if config.isg.weight > 0:
        anchors.check_margin(config.isg.margin)
    generator = build_network(_student(config), config, ranks)
    fake_score = build_network(_student(config), config, ranks)
    parts = Distillation(
        config=config,
        adapter=adapter,
        anchors=anchors,
        teacher=build_network(teacher_source(teacher, compute), config, ranks),
        generator=Trained.build(generator, config.optimizer.lr, config.optimizer),
        fake_score=Trained.build(fake_score, config.optimizer.fake_score_lr, config.optimizer),
        discriminator=build_discriminator(config, ranks),
        device=ranks.device,
    )
    dataset = JsonImages(
        Path(config.paths.dataset),
        config.train.resolution,
        crop=config.data.crop,
        seed=config.train.seed,
        max_unreadable=config.data.max_unreadable,
    )
    if ranks.is_main:
        open_run_folder(folder, config)
    train, on_gpu = config.train, ranks.device.type == "cuda"
    share = Share(
        train.seed, train.batch_size, train.grad_accumulation, ranks.rank, ranks.world_size
    )
    data = partial(batches, dataset, share, config.data.num_workers, on_gpu)
    return Run(config, parts, ranks, data, partial(export, parts, _student(config), ranks), folder)


def _student(config: Config):
    paths = config.paths
    return student_source(
        Path(paths.pretrained_model),
        Path(paths.student_config) if paths.student_config else None,
        Path(paths.flux_wo_guidance_embed) if paths.flux_wo_guidance_embed else None,
        config.student.fold_guidance,
    )


if __name__ == "__main__":
    main("senseflow.trainer.trainer_flux_senseflow", check, prepare)
