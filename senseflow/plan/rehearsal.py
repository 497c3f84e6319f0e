"""A run without numbers: every part of it built and sharded by the run's own code, and iterations.

`rehearse` is what `senseflow.engine.build.prepare` does but for files of the run; an iteration is
`senseflow.distill.algorithm.take_turn`.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from senseflow.config.config import Config
from senseflow.core.draws import Draws
from senseflow.data.sampler import Batch, batches
from senseflow.distill import algorithm as distill
from senseflow.distill.adversaries import VFMDiscriminator
from senseflow.distill.measures import Measures
from senseflow.distill.rewards import Scorer
from senseflow.distill.rollout import draw_transitions
from senseflow.distill.state import Distillation, Turn
from senseflow.engine.build import assemble, share
from senseflow.optim.compact_adamw import CompactAdamW
from senseflow.optim.trained import Trained
from senseflow.plan.blank import PlanData, blank_inputs, blank_rewards
from senseflow.plan.fakes import Loading, fake_ranks, fake_whole, real_meshes
from senseflow.plan.memo import Memo
from senseflow.plan.tracker import AVERAGES, OFFLOADED, PARAMETERS, STATES, PhaseCost, Tracker
from senseflow.teachers.family import Family
from senseflow.weights.lora import Role
from senseflow.weights.packed import num_weights


@dataclass(frozen=True)
class Kind:
    """What tells iterations apart."""

    generator: bool  # theta's turn
    anchor: int  # 0 is the noisiest
    simulate: bool
    steps: int  # of the walk

    def turn(self, d: Distillation) -> Turn:
        """The first iteration of this kind."""
        anchors = d.anchors.of_walk(self.steps)
        adversarial = d.has_adversary(anchors.times[self.anchor])
        turn = Turn(1, anchors, self.anchor, self.simulate, self.generator, adversarial)
        if self.generator and d.config.reward.weight > 0:
            return replace(turn, transitions=draw_transitions(d, turn, Draws(d.seed, 1, ())))
        return turn

    def __str__(self) -> str:
        turn = "generator turn" if self.generator else "plain turn"
        if self.anchor == 0:
            return f"{turn}, top anchor of {self.steps}"
        how = "simulated" if self.simulate else "from data"
        return f"{turn}, anchor {self.anchor} of {self.steps}, {how}"


def silent_anchors(d: Distillation) -> list[int]:
    """Numbers of the anchors at which no adversary plays, 0 is the noisiest."""
    return [number for number, tau in enumerate(d.anchors.times) if not d.has_adversary(tau)]


def trained_of(d: Distillation) -> dict[str, Trained]:
    """The networks that learn, by name."""
    found = {"generator": d.generator, "fake_score": d.fake_score}
    return found | ({"heads": d.discriminator.heads} if d.discriminator else {})


def networks_of(d: Distillation) -> dict[str, nn.Module]:
    """All networks of a run by name, those that learn first."""
    found = {name: trained.network for name, trained in trained_of(d).items()}
    found["teacher"] = d.teacher.base.network if isinstance(d.teacher, Role) else d.teacher
    if isinstance(d.discriminator, VFMDiscriminator):
        found["dinov2"] = d.discriminator.backbone
        if d.discriminator.prompt_encoder:
            found["clip_text"] = d.discriminator.prompt_encoder
    for scorer in d.rewards.scorers if d.rewards else ():
        if scorer.network:
            found[reward_name(scorer)] = scorer.network
    parts = d.adapter.pipeline.components
    components = {k: v for k, v in parts.items() if isinstance(v, nn.Module)}
    return found | dict(sorted(components.items()))


def reward_name(scorer: Scorer) -> str:
    """As in stats.jsonl."""
    return f"reward/{scorer.name}"


@contextmanager
def watching(d: Distillation, callers: list[str]) -> Iterator[None]:
    """While a network's forward runs its name is in `callers`, the outermost first.

    An autoencoder is its two halves; DMD2's pass through the fake score's encoder is a forward, and
    so is all that a reward does.
    """

    def leave(*_: Any) -> None:
        callers.pop()

    with ExitStack() as stack:
        for name, network in [*networks_of(d).items(), *halves(d.adapter.pipeline.vae)]:
            for handle in (
                network.register_forward_pre_hook(
                    lambda *_, n=name: callers.append(n), prepend=True
                ),
                network.register_forward_hook(leave, always_call=True),
            ):
                stack.callback(handle.remove)
            if isinstance(network, Role) or "encode" in vars(network):
                watched = _watched(cast(Any, network).encode, name, callers)
                stack.enter_context(patch.object(network, "encode", watched))
        if d.rewards:
            scorers = [
                replace(s, score=_watched(s.score, reward_name(s), callers))
                for s in d.rewards.scorers
            ]
            stack.enter_context(patch.object(d.rewards, "scorers", scorers))
        yield


def halves(vae: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules by which an autoencoder is run; SDXL's has a convolution more on each side."""
    names = {"encoder": "encoder", "quant_conv": "encoder"}
    names |= {"decoder": "decoder", "post_quant_conv": "decoder"}
    found = ((half, getattr(vae, name, None)) for name, half in names.items())
    return [(f"vae.{half}", module) for half, module in found if module is not None]


def _watched(function: Callable[..., Any], name: str, callers: list[str]) -> Callable[..., Any]:
    def called(*args: Any, **kwargs: Any) -> Any:
        callers.append(name)
        try:
            return function(*args, **kwargs)
        finally:
            callers.pop()

    return called


AWAY: dict[str, tuple[str, ...]] = {
    "none": (),
    "trained": ("generator", "fake_score"),
    "heads": ("heads",),
}
"""The networks that are kept in host memory, by `parallel.offload`."""


@dataclass
class NetworkBytes:
    """One network on one rank."""

    numel: int  # of the whole network
    parameters: dict[str, int]  # bytes of this rank's shards and of buffers, by dtype
    gradients: int = 0
    states: int = 0  # of its optimizer
    average: int = 0


@dataclass
class Rehearsal:
    """The parts of a run, all fake."""

    parts: Distillation
    micro_batches: list[Batch]
    mode: FakeTensorMode
    tracker: Tracker

    def iterate(self, kind: Kind) -> dict[str, PhaseCost]:
        """One iteration of this kind; its costs by phase."""
        turn = kind.turn(self.parts)
        with self.mode, self.tracker, watching(self.parts, self.tracker.callers):
            self._gather_kept()
            self.tracker.phases = {}  # forgotten; what lives goes on living
            distill.take_turn(self.parts, turn, self.micro_batches, Measures())
            self._gather_kept()
        return {name: cost for name, cost in self.tracker.phases.items() if cost.peak or cost.flops}

    def _gather_kept(self) -> None:
        """Gather what the next iteration finds gathered: of networks that stay so the teacher, and
        a student that has not moved.

        What moved is gathered when an iteration has ended ("between"), so that all find the same.
        In a LoRA run the one base is resharded by the fake score's step, in every iteration.
        """
        config = self.parts.config
        if config.parallel.reshard_after_forward or config.lora.rank is not None:
            return
        guided = config.dmd.weight + config.isg.weight > 0  # else no teacher is asked
        for network in (self.parts.generator.network, *([self.parts.teacher] if guided else [])):
            units = [module for module in network.modules() if isinstance(module, FSDPModule)]
            for unit in units:
                cast(Any, unit)._get_fsdp_state()._lazy_init()  # the root first, as in a forward
                unit.unshard()

    def hold(self) -> dict[str, NetworkBytes]:
        """Give every optimizer its states, as a first step does; bytes by network.

        What networks share is counted with the first of them.
        """
        tracker, held = self.tracker, {}
        away = AWAY[self.parts.config.parallel.offload]
        for name, network in networks_of(self.parts).items():
            held[name] = NetworkBytes(*self._parameters(network, name in away))
        if self.parts.ema:
            kind = OFFLOADED if "generator" in away else AVERAGES
            held["generator"].average = tracker.mark(self.parts.ema.shards.values(), kind)
        for name, trained in trained_of(self.parts).items():
            held[name].gradients = self._make_states(trained)
            states = [x for x in tree_leaves(dict(trained.optimizer.state)) if torch.is_tensor(x)]
            held[name].states = tracker.mark(states, OFFLOADED if name in away else STATES)
            if name in away:
                for parameter in trained.network.parameters():
                    parameter.register_post_accumulate_grad_hook(self._comes_down)
        return held

    def _comes_down(self, parameter: Tensor) -> None:
        """FSDP2 has copied a unit's gradients to the host."""
        assert parameter.grad is not None
        self.tracker.mark([parameter.grad], OFFLOADED)

    def _make_states(self, trained: Trained) -> int:
        """Returns the bytes of gradients like those of a backward."""
        parameters = [p for p in trained.network.parameters() if p.requires_grad]
        optimizer = trained.optimizer
        with self.mode:
            gradients = [torch.zeros_like(p) for p in parameters]
            if isinstance(optimizer, CompactAdamW):
                optimizer.make_states()  # a step of its groups is the dearest part of a trace
            else:
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.grad = gradient
                trained.step(seed=0)
        return storage_bytes(gradients)

    def _parameters(self, network: nn.Module, away: bool) -> tuple[int, dict[str, int]]:
        """Elements, and bytes here by dtype; away: the parameters are in host memory."""
        sizes: dict[str, int] = {}
        tensors = [*network.parameters(), *network.buffers()]
        for tensor in tensors:
            dtype = str(tensor.dtype).removeprefix("torch.")
            kind = OFFLOADED if away and isinstance(tensor, nn.Parameter) else PARAMETERS
            sizes[dtype] = sizes.get(dtype, 0) + self.tracker.mark([tensor], kind)
        return num_weights(network), {k: v for k, v in sizes.items() if v}


def storage_bytes(tensors: list[Tensor]) -> int:
    """Bytes of the storages of tensors on this rank, each once."""
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    storages = {id(s): s for s in (t.untyped_storage() for t in local)}
    return sum(s.nbytes() for s in storages.values())


@contextmanager
def rehearse(
    config: Config, family: Family, world_size: int, data: PlanData
) -> Iterator[Rehearsal]:
    """Rank 0 of so many, before its first iteration."""
    mode, memo = FakeTensorMode(allow_non_fake_inputs=True), Memo()
    inputs = blank_inputs(config, family, data)
    with fake_ranks(world_size, config.parallel.replicas) as ranks, real_meshes():
        with mode, Loading(memo) as loading:
            parts = assemble(inputs, ranks, {}, loading.unwritten(blank_rewards))
        own_share = share(config, ranks)
        real = next(batches(inputs.data, own_share, num_workers=0, pin_memory=False, start=1))
        fake = [batch.map(mode.from_tensor) for batch in real]
        rehearsal = Rehearsal(parts, fake, mode, Tracker(memo))
        fake_whole(networks_of(parts).values(), mode)
        yield rehearsal
