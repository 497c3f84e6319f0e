"""From a recipe and its configuration to a run: networks sharded on their device, data, export."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from senseflow.common.devices import set_matmul
from senseflow.common.ranks import Ranks, join_group, start_ranks
from senseflow.common.weights_files import size_in_words
from senseflow.config.config import Config
from senseflow.config.sections import Dtype, ParallelConfig
from senseflow.config.teacher import torch_dtype
from senseflow.core.anchors import Anchors
from senseflow.data.items import Samples
from senseflow.data.sampler import Share, batches
from senseflow.distill.foresight import Foresight
from senseflow.distill.rewards import Rewards
from senseflow.distill.state import Distillation
from senseflow.engine.adversary import (
    build_discriminator,
    check_backbone,
    fetch_frozen,
    heads_as_trained,
)
from senseflow.engine.agreement import require_equal
from senseflow.engine.checkpoint_folders import complete_checkpoints, require_run_base
from senseflow.engine.compilation import settle
from senseflow.engine.disk import HostGroup, share_folder
from senseflow.engine.export import Layout, StudentExport
from senseflow.engine.hold import Hold
from senseflow.engine.initial import (
    Choose,
    Initial,
    begun_with,
    identity,
    is_run,
    newest,
    newest_undamaged,
    open_initial,
)
from senseflow.engine.inputs import (
    Inputs,
    Setup,
    check_offload,
    what_is_shared,
)
from senseflow.engine.loop import Run
from senseflow.engine.lora import build_roles, check_lora, initial_adapters, lora_layout
from senseflow.engine.parallel import (
    compile_blocks,
    keep_parameters_in,
    recompute,
    recompute_decoder,
    shard,
)
from senseflow.engine.rewards import check_rewards, open_rewards
from senseflow.optim.ema import Ema
from senseflow.optim.trained import Trained
from senseflow.teachers.folder import name_of
from senseflow.weights.card import StudentCard
from senseflow.weights.filling import fill_shards
from senseflow.weights.meta import NetworkSource

if TYPE_CHECKING:
    from senseflow.teachers.adapter import Adapter

logger = logging.getLogger(__name__)

OpenRewards = Callable[[Config, Ranks], Rewards | None]


@dataclass(frozen=True)
class Teacher:
    """A teacher on its device with its data, and no student.

    unguided: the scale at which its guidance leaves the prompt's own prediction; None: at no scale.
    """

    adapter: "Adapter"
    unguided: float | None
    anchors: Anchors
    teacher: nn.Module
    dataset: Samples
    ranks: Ranks

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return self.ranks.device


def prepare_teacher(inputs: Inputs) -> Teacher:
    """The teacher of a run alone, sharded as in training."""
    join_group()
    require_equal(what_is_shared(inputs))
    inputs = settled(inputs)
    config, family, settings = inputs.config, inputs.family, inputs.settings
    ranks = start_ranks(config.parallel.replicas)
    set_matmul(ranks.device, config.precision.matmul)
    build = partial(build_network, config=config, ranks=ranks)
    reshard = config.parallel.reshard_after_forward
    return Teacher(
        adapter=family.load_adapter(settings, ranks.device, build, inputs.cache.prompts),
        unguided=None if family.embeds_guidance else family.unguided,
        anchors=inputs.anchors,
        teacher=build(family.teacher(settings), reshard_after_forward=reshard),
        dataset=inputs.cache.samples(inputs.data, see_images=False),
        ranks=ranks,
    )


def prepare(inputs: Inputs, folder: Path, hold: Hold | None = None) -> Run:
    """Every part of the run, sharded and on its device.

    hold: on the folder, to be taken before anything is read or written there.
    """
    config, cache = inputs.config, inputs.cache
    device = join_group()
    check_offload(config.parallel.offload, torch.cuda.device_count())
    begins_with = identity(Path(config.paths.initial)) if config.paths.initial else None
    # Before any collective whose order hangs on it: ranks that differ there would wait for ever.
    require_equal(what_is_shared(inputs) | {"paths.initial": begins_with})
    ranks = start_ranks(config.parallel.replicas)
    host = HostGroup(ranks)
    share_folder(folder, host)
    if hold:
        host.on_main(hold.take)
    host.on_main(lambda: require_run_base(folder, config))
    if config.adversarial.in_use == "vfm":  # before anything large: it may not be there
        host.on_first_of_node(lambda: fetch_frozen(config, cache.text_dim))
    if cache.known:
        logger.info("from paths.cache %s: %s", config.paths.cache, ", ".join(cache.known))
    initial = choose_initial(inputs, folder, host)
    inputs = heads_as_trained(inputs, folder, initial, host)
    parts = assemble(inputs, ranks, initial)
    samples = cache.samples(inputs.data, see_images=config.adversarial.in_use == "vfm")
    on_gpu = device.type == "cuda"
    data = partial(batches, samples, share(config, ranks), config.data.num_workers, on_gpu)
    written = export(inputs, config.precision.compute)
    return Run(inputs.config, parts, ranks, data, written, folder)


def check_teacher(inputs: Inputs) -> None:
    """Raise ValueError where the weights of the teacher, its VAE or its text encoders do not fit
    their configs; none is loaded."""
    settings = inputs.settings
    inputs.family.teacher(settings)
    inputs.family.vae(settings)
    if inputs.cache.prompts is None:
        inputs.family.text_encoders(settings)


def check_networks(inputs: Inputs) -> None:
    """Raise ValueError where what a run begins with does not fit, its adversary's backbone is none
    or its rewards are not there; no weights are loaded."""
    check_rewards(inputs.config, inputs.data)
    check_teacher(inputs)
    if inputs.config.adversarial.in_use == "vfm":
        check_backbone(inputs.config)
    settings, initial = inputs.settings, initial_of(inputs)
    if settings.lora:
        check_lora(inputs, settings.lora, initial)
    else:
        begun_with(initial, "generator", inputs.family, inputs.family.student(settings))


def assemble(
    inputs: Inputs, ranks: Ranks, initial: Initial, rewards: OpenRewards = open_rewards
) -> Distillation:
    """The networks of a run, sharded and on their device, with their optimizers.

    No text encoder is loaded where the inputs' cache knows what they say. rewards: opens those of
    the configuration.
    """
    inputs = settled(inputs)
    config, known = inputs.config, inputs.cache
    set_matmul(ranks.device, config.precision.matmul)
    build = partial(build_network, config=config, ranks=ranks)
    opened = rewards(config, ranks)  # first: files of another model are found while little is read
    encoders = "the VAE" if known.prompts is not None else "the text encoders and the VAE"
    logger.info("reading %s of %s", encoders, inputs.settings.folder)
    adapter = inputs.family.load_adapter(inputs.settings, ranks.device, build, known.prompts)
    if config.parallel.activation_checkpointing:
        # On theta's turn L_adv goes back through the decoder, often the worst moment for memory.
        wholly = config.parallel.recomputation == "full"
        kinds = adapter.decoder_blocks + (adapter.decoder_stages if wholly else ())
        recompute_decoder(adapter.pipeline.vae.decoder, kinds, adapter.decoder_norms)
    optimizer, compiled = config.optimizer, config.parallel.compiled
    teacher, generator, fake_score = build_networks(inputs, initial, ranks)
    return Distillation(
        config=config,
        adapter=adapter,
        anchors=inputs.anchors,
        teacher=teacher,
        generator=Trained.build(generator, optimizer.lr, optimizer, compiled),
        fake_score=Trained.build(fake_score, optimizer.fake_score_lr, optimizer, compiled),
        discriminator=build_discriminator(inputs, adapter, fake_score, ranks, initial),
        device=ranks.device,
        ema=Ema.start(generator, config.ema.decay) if config.ema.decay else None,
        foresight=Foresight(ranks.device),
        rewards=opened,
    )


def settled(inputs: Inputs) -> Inputs:
    """With `parallel.compile` as this machine has it; raises ValueError where it cannot be."""
    parallel = settle(inputs.config.parallel, torch.cuda.device_count())
    return replace(inputs, config=replace(inputs.config, parallel=parallel))


def build_networks(
    inputs: Inputs, initial: Initial, ranks: Ranks
) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Teacher, generator and fake score: three networks, or three roles of one (LoRA)."""
    config, family, settings = inputs.config, inputs.family, inputs.settings
    reshard = config.parallel.reshard_after_forward
    build = partial(build_network, config=config, ranks=ranks, reshard_after_forward=reshard)
    if settings.lora:
        return build_roles(family, settings, settings.lora, initial, build, ranks.device)
    generator, fake_score = (
        build_trained(
            begun_with(initial, name, family, family.student(settings)), config, ranks, said
        )
        for name, said in (("generator", "student"), ("fake_score", "fake score"))
    )
    return build(family.teacher(settings), role="teacher"), generator, fake_score


def build_trained(source: NetworkSource, config: Config, ranks: Ranks, role: str) -> nn.Module:
    """Student or fake score: its masters in their own type and place."""
    keep_parameters_in(source.network, torch_dtype(config.precision.masters))
    parallel = config.parallel
    offload, reshard = parallel.offload == "trained", parallel.reshard_after_forward
    return build_network(source, config, ranks, offload, role, reshard)


def build_network(
    source: NetworkSource,
    config: Config,
    ranks: Ranks,
    offload: bool = False,
    role: str = "",
    reshard_after_forward: bool = True,
) -> nn.Module:
    """Shard a network on the meta device, then read its weights into the shards, which is said.

    One that is frozen, on a rank of its own, is left as it is: a unit's gathering would copy it.

    role: what the network is in the run. reshard_after_forward: false keeps it gathered between its
    passes; text encoders have one each.
    """
    name = f"{f'the {role}, ' if role else ''}{type(source.network).__name__}"
    size = size_in_words(sum(p.nbytes for p in source.network.parameters()))
    logger.info("reading %s: %s over all ranks", name, size)
    # Sharded before it has memory: no rank ever holds the network whole.
    lighten(source, config.parallel)
    compute = torch_dtype(config.precision.compute)
    learns_or_is_cast = any(
        p.requires_grad or p.dtype != compute for p in source.network.parameters()
    )
    if ranks.mesh.shape[-1] > 1 or learns_or_is_cast:
        shard(
            source.network,
            source.blocks,
            ranks.mesh,
            compute,
            offload,
            reshard_after_forward=reshard_after_forward,
        )
    fill_shards(source.network, source.read, ranks.device, offload)
    return source.network


def lighten(source: NetworkSource, parallel: ParallelConfig) -> None:
    """Recompute what learns, compile all that repeats."""
    learns = any(p.requires_grad for p in source.network.parameters())
    every = parallel.activation_checkpointing if learns else 0
    selective = parallel.recomputation == "selective"
    if parallel.compiled:
        compile_blocks(source.repeated, every, selective)
    else:
        recompute(source.repeated, every, selective, source.recompute_context)


def share(config: Config, ranks: Ranks) -> Share:
    """This rank's share of the global batches."""
    train, reward = config.train, config.reward
    return Share(
        train.seed,
        train.batch_size,
        train.grad_accumulation,
        ranks.rank,
        ranks.world_size,
        config.data.separate_real,
        reward.group_size if reward.weight > 0 else 1,
        config.fake_score.ttur,
    )


def initial_of(inputs: Inputs, choose: Choose = newest) -> Initial:
    """What the run begins with in the teacher's place."""
    if not inputs.config.paths.initial:
        return {}
    path, lora = Path(inputs.config.paths.initial), inputs.settings.lora
    if lora and path.exists() and not is_run(path):
        return initial_adapters(inputs.family, inputs.settings.folder, lora, path)
    return open_initial(path, choose)


def choose_initial(inputs: Inputs, folder: Path, host: HostGroup) -> Initial:
    """What the run begins with, checked for damage unless it has a checkpoint of its own."""
    begins = not host.on_main(lambda: complete_checkpoints(folder / "checkpoints"))
    initial = initial_of(inputs, partial(newest_undamaged, host=host) if begins else newest)
    if initial and begins and host.is_main:
        logger.info("beginning with %s of %s", ", ".join(initial), inputs.config.paths.initial)
    return initial


def export(setup: Setup, dtype: Dtype) -> StudentExport:
    """How the student becomes a diffusers folder, with a card of how it is to be sampled."""
    family, settings, train = setup.family, setup.settings, setup.config.train
    eta = setup.config.reward.simulated_eta
    card = StudentCard(
        family=family.name,
        anchors=family.sampled_at(setup.path, setup.anchors),
        height=train.resolution[0],
        width=train.resolution[1],
        guidance=settings.guidance if settings.lora else None,
        max_sequence_length=settings.max_sequence_length,
        base_name=name_of(settings.folder),
        base_fingerprint=setup.fingerprint,
        iteration=0,
        recipe=setup.config.recipe,
        base_form=None if setup.config.lora.base == "bfloat16" else setup.config.lora.base,
        eta=eta if eta < 1 else None,
    )
    if settings.lora:
        return StudentExport(lora_layout(family, settings, settings.lora, torch_dtype(dtype)), card)
    return StudentExport(Layout.plan(family.student(settings).network, torch_dtype(dtype)), card)
