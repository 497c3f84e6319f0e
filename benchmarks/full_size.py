"""The recipes at full size on fake tensors, unsharded and put together by hand.

What `senseflow.plan` traces sharded and by the run's own code is compared with this: networks are
built from the published configurations on the meta device through the package's families and
adapters, and whole iterations of `senseflow.distill.algorithm` run on fake tensors. FSDP2's mixed
precision is imitated module by module; tokenizers have a vocabulary of four.

TFLOP are those of matrix products, convolutions and attention (torch's FlopCounterMode), of one
sample: all networks, text encoders and autoencoder too. Four iterations are counted: a generator
turn and a plain one, at the top anchor and from data. A simulated iteration at anchor i differs
from one from data by i forwards of the student instead of an encoding. The mean weighs each kind
with its probability: a generator turn 1 / N, each anchor 1 / K, simulation p.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils.flop_counter import FlopCounterMode

from senseflow.common.files import ROOT
from senseflow.config.config import Config
from senseflow.config.load import load_recipe
from senseflow.config.recipes import Recipe
from senseflow.config.teacher import teacher_settings, torch_dtype
from senseflow.data.sampler import Batch
from senseflow.distill import algorithm as distill
from senseflow.distill.adversaries import BottleneckDiscriminator, VFMDiscriminator
from senseflow.distill.bottleneck import ClassifierHead, add_encoder_pass
from senseflow.distill.measures import Measures
from senseflow.distill.state import Discriminator, Distillation, Turn
from senseflow.distill.vfm_features import FrozenBackbone, PromptEncoder
from senseflow.distill.vfm_heads import Heads, no_power_iterations
from senseflow.engine.adversary import layers_of
from senseflow.engine.inputs import check_times
from senseflow.engine.parallel import recompute, recompute_decoder
from senseflow.optim.trained import Trained
from senseflow.plan.rehearsal import trained_of
from senseflow.teachers import adapter as adapters
from senseflow.teachers import text_encoders
from senseflow.teachers.adapter import Adapter
from senseflow.teachers.family import DataKind
from senseflow.teachers.folder import TeacherSettings
from senseflow.teachers.text_encoders import kind_of
from senseflow.weights import meta as networks
from senseflow.weights.meta import NetworkSource
from senseflow.weights.stored import Weights


def write_folder(folder: Path, recipe: Recipe) -> None:
    """The teacher's pipeline folder: its JSON files and tokenizers of a letter, no weights."""
    family = recipe.family
    kinds = family.networks().adapter.text_encoders
    trees = family.published.files(family.pipeline_class, family.component)
    for name, tree in trees.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(tree, indent=2))
    for suffix, encoder in family.published.numbered():
        tokenizer = kind_of(folder, encoder.name, kinds).tokenizer(encoder.length)
        tokenizer.save_pretrained(folder / f"tokenizer{suffix}")


# ----------------------------------------------------------------- networks without their weights


class NoWeights(Weights):
    """The weights of a folder without any: they fit every network and are never read."""

    def require(self, keys: Any, spare: str | None = None) -> None:
        pass


def no_weights(folder: Path) -> Weights:
    return NoWeights(folder, [], lambda key: torch.empty(0))


def fake(network: nn.Module, mode: FakeTensorMode) -> Any:
    """The same network of the meta device with fake tensors of the CPU; shared ones stay shared."""
    made: dict[int, Tensor] = {}

    def of(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        if id(tensor) not in made:
            with mode:
                empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                learns = isinstance(tensor, nn.Parameter)
                made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if learns else empty
        return made[id(tensor)]

    for module in network.modules():
        for held in (module._parameters, module._buffers):
            held.update({name: of(tensor) for name, tensor in held.items()})
    return network


def compute_in(network: nn.Module, dtype: torch.dtype) -> None:
    """FSDP2's mixed precision, unsharded: every module computes with its float32 parameters cast,
    in a recomputed forward too; gradients reach the float32 ones."""

    def cast(module: nn.Module, args: Any) -> None:
        module.masters = dict(module._parameters)
        for key, p in module.masters.items():
            module._parameters[key] = None if p is None else p.to(dtype)

    def restore(module: nn.Module, args: Any, output: Any) -> None:
        module._parameters.update(module.masters)

    for module in network.modules():
        if module._parameters:
            module.register_forward_pre_hook(cast)
            module.register_forward_hook(restore, always_call=True)


def fake_adapter(recipe: Recipe, settings: TeacherSettings, mode: FakeTensorMode) -> Adapter:
    """The family's adapter of a folder, in the dtypes of the settings."""
    with (
        patch.object(networks, "component_weights", no_weights),
        patch.object(adapters, "whole", lambda source, _: fake(source.network, mode)),
    ):
        return recipe.family.load_adapter(
            settings, torch.device("cpu"), lambda source: fake(source.network, mode)
        )


# ------------------------------------------------------------------------------------- the parts


@dataclass(frozen=True)
class Instance:
    """A recipe at full size."""

    parts: Distillation
    batch: Batch
    mode: FakeTensorMode
    recomputed: list[nn.Module]  # what activation checkpointing may run again


def build(recipe: Recipe, folder: Path, overrides: list[str] | None = None) -> Instance:
    """The published recipe on the folder of `write_folder`, every tensor a fake one."""
    config = load_recipe(
        recipe, ROOT / recipe.config, [f"paths.pretrained_model={folder}", *(overrides or [])]
    )
    settings, family = teacher_settings(config), recipe.family
    family.require(settings)
    anchors = family.anchors(settings, config.anchors.times)
    check_times(config, family.path(settings), anchors)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with (
        patch.object(networks, "component_weights", no_weights),
        patch.object(text_encoders, "component_weights", no_weights),
    ):
        adapter = fake_adapter(recipe, settings, mode)
        teacher = family.teacher(settings).network
        sources = [family.student(settings) for _ in range(2)]
    generator, fake_score = (student(source, config, mode) for source in sources)
    optimizer = config.optimizer
    parts = Distillation(
        config=config,
        adapter=adapter,
        anchors=anchors,
        teacher=fake(teacher, mode),
        generator=Trained.build(generator, optimizer.lr, optimizer),
        fake_score=Trained.build(fake_score, optimizer.fake_score_lr, optimizer),
        discriminator=discriminator(config, adapter, fake_score, mode),
        device=torch.device("cpu"),
    )
    with mode:
        batch = one_sample(config, adapter, family.data)
    instance = Instance(parts, batch, mode, [b for source in sources for b in source.repeated])
    checkpointing(instance, config.parallel.activation_checkpointing)
    return instance


def student(source: NetworkSource, config: Config, mode: FakeTensorMode) -> nn.Module:
    """Generator or fake score."""
    fake(source.network, mode)
    compute_in(source.network, torch_dtype(config.precision.compute))
    return source.network


def discriminator(
    config: Config, adapter: Adapter, fake_score: nn.Module, mode: FakeTensorMode
) -> Discriminator | None:
    """The adversary of the configuration; DINOv2 and CLIP are of the names in its paths."""
    settings, optimizer = config.adversarial, config.optimizer
    if settings.in_use == "bottleneck":
        width = fake_score.config.block_out_channels[-1]
        with torch.device("meta"):
            head = ClassifierHead(width, settings.downsamplings, settings.norm_groups, seed=0)
        add_encoder_pass(fake_score)
        trained = Trained.build(fake(head, mode), optimizer.discriminator_lr, optimizer)
        return BottleneckDiscriminator(adapter, trained)
    with torch.device("meta"):
        backbone = FrozenBackbone(
            config.paths.dinov2,
            settings.taps,
            random_seed=0,
            dtype=torch_dtype(config.precision.compute),
        )
        prompt_encoder = PromptEncoder(config.paths.clip, checkpoint=None, random_seed=0)
        with no_power_iterations():
            heads = Heads(
                backbone.num_features,
                backbone.width,
                prompt_encoder.dim,
                settings.reference != "none",
                layers_of(settings),
                dtype=torch_dtype(config.precision.heads),
            ).eval()
    return VFMDiscriminator(
        fake(backbone, mode),
        fake(prompt_encoder, mode),
        Trained.build(fake(heads, mode), optimizer.discriminator_lr, optimizer),
    )


def one_sample(config: Config, adapter: Adapter, data: DataKind) -> Batch:
    """One sample, an image or latents."""
    if data == "latents":
        one = Batch(["a"], [0], latents=torch.empty(1, *adapter.latent_shape()))
    else:
        one = Batch(["a"], [0], images=torch.empty(1, 3, *config.train.resolution))
    return replace(one, other=one if config.data.separate_real else None)


# ------------------------------------------------------------------------------------ iterations


@dataclass
class Trace:
    """What one iteration did."""

    pictures: dict[str, torch.Size]  # the latents it returns
    calls: list[tuple[str, int, bool]]  # network, samples at once, whether with gradient
    # of each step: network, and every parameter's own shape, its gradient's, its moments'
    steps: dict[str, list[tuple[torch.Size, torch.Size | None, torch.Size | None]]]


def trace(instance: Instance, generator: bool, anchor: int, simulate: bool) -> Trace:
    """Run one iteration of this kind."""
    d = instance.parts
    with unset_fake_temporarily():  # a drawn number is asked
        adversarial = d.has_adversary(d.anchors.times[anchor])
    turn = Turn(1, d.anchors, anchor, simulate, generator, adversarial)
    with watched(instance) as (calls, steps), instance.mode:
        pictures = distill.take_turn(d, turn, [instance.batch], Measures())
    return Trace({name: x.shape for name, x in pictures.items()}, calls, steps)


@contextmanager
def watched(instance: Instance) -> Iterator[tuple[list[Any], dict[str, list[Any]]]]:
    """Lists that the calls of whole denoisers and the steps of trained networks are added to."""
    d, handles = instance.parts, []
    calls: list[Any] = []
    steps: dict[str, list[Any]] = defaultdict(list)

    def watch_calls(name: str, network: nn.Module) -> None:
        def called(module: nn.Module, args: Any, kwargs: Any) -> None:
            sample = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            calls.append((name, len(sample), torch.is_grad_enabled()))

        handles.append(network.register_forward_pre_hook(called, with_kwargs=True))

    def watch_steps(name: str, trained: Trained) -> None:
        def stepped(optimizer: torch.optim.AdamW, args: Any, kwargs: Any) -> None:
            for p in trained.network.parameters():
                state = optimizer.state[p]
                moment = state.get("exp_avg", state.get("exp_avg_codes"))  # or in 8 bits
                shapes = [None if x is None else x.shape for x in (p, p.grad, moment)]
                steps[name].append(tuple(shapes))

        handles.append(trained.optimizer.register_step_post_hook(stepped))

    watch_calls("teacher", d.teacher)
    for name, trained in trained_of(instance.parts).items():
        watch_steps(name, trained)
        if name != "heads":
            watch_calls(name, trained.network)
    try:
        yield calls, steps
    finally:
        for handle in handles:
            handle.remove()


# ----------------------------------------------------------------------------------------- FLOPs


@dataclass(frozen=True)
class Costs:
    """Counted FLOPs of one sample."""

    forward: int  # of the student
    encode: int  # of the image; 0 where the data are latents
    turns: dict[tuple[bool, bool], int]  # generator turn, top anchor; from data

    def at(self, generator: bool, anchor: int, simulate: bool) -> int:
        """An iteration of this kind."""
        if anchor == 0 or not simulate:
            return self.turns[generator, anchor == 0]
        return self.turns[generator, False] - self.encode + anchor * self.forward

    def mean(self, config: Config) -> float:
        """The mean over the recipe's iterations."""
        p, total = config.backward_simulation.probability, 0.0
        num = len(config.anchors.times)
        often = 1 / config.fake_score.ttur
        for generator, share in ((True, often), (False, 1 - often)):
            for anchor in range(num):
                for simulate, chance in ((True, p), (False, 1 - p)):
                    total += share / num * chance * self.at(generator, anchor, simulate)
        return total


def count(instance: Instance, work: Callable[[], object]) -> int:
    """FLOPs of a call."""
    with instance.mode, FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def costs(instance: Instance) -> Costs:
    """Count the four iterations and what the others are made of."""
    d, batch = instance.parts, instance.batch
    with instance.mode, torch.no_grad():
        eps = torch.empty(1, *d.adapter.latent_shape())
        t = torch.empty(1)
        cond = d.adapter.encode_prompts(batch.prompts)
        predict = partial(d.adapter.predict, d.generator.network, eps, t, cond)
        forward = count(instance, predict)
        encode = 0
        if batch.images is not None:
            encode = count(instance, partial(d.adapter.encode_images, batch.images))
    turns = {
        (generator, top): count(
            instance, partial(trace, instance, generator, 0 if top else 1, False)
        )
        for generator in (True, False)
        for top in (True, False)
    }
    return Costs(forward, encode, turns)


def checkpointing(instance: Instance, every: int) -> None:
    """Activation checkpointing of every `every`-th block of what is trained, in the way of the
    configuration, and of the VAE; 0: of nothing."""
    selective = instance.parts.config.parallel.recomputation == "selective"
    for block in instance.recomputed:
        vars(block).pop("forward", None)
    recompute(instance.recomputed, every, selective)
    adapter, adversary = instance.parts.adapter, instance.parts.discriminator
    vision = [*adversary.backbone.vit.blocks] if isinstance(adversary, VFMDiscriminator) else []
    decoder = adapter.pipeline.vae.decoder
    for part in [*decoder.modules(), *vision]:
        vars(part).pop("forward", None)
    if every:
        kinds = adapter.decoder_blocks + (() if selective else adapter.decoder_stages)
        recompute_decoder(decoder, kinds, adapter.decoder_norms)
        recompute(vision, every=1)
