"""What a run costs: the kinds of iterations that are traced, their mean, the worst of them.

Kinds differ in few ways. A simulated iteration is one from data with another way to its input, the
phase `generate`: as many forwards of the student as anchors lie above, instead of an encoding. So
few kinds are traced, and the mean weighs each with its probability: a generator turn 1 / N, each
number of steps alike and of it each anchor, simulation p. A generator turn with a rollout goes all
the way whatever was drawn.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import product

from senseflow.config.config import Config
from senseflow.plan.rehearsal import Kind
from senseflow.plan.reserve import reserve
from senseflow.plan.tracker import PhaseCost

Phases = dict[str, PhaseCost]
Quantity = Callable[[PhaseCost], float]

GIB = 2**30
DENSE_TFLOPS = {"A100": 312, "H100": 989, "H200": 989}  # bfloat16, NVIDIA's data sheets


@dataclass(frozen=True)
class Gpu:
    """What is assumed of each GPU."""

    memory: float  # GiB
    mfu: float  # share of its dense bfloat16 peak that training reaches
    reserve: float | None = None  # GiB that no tensor gets; None: by the number of ranks

    def kept(self, ranks: int, replicas: int) -> float:
        """GiB that no tensor gets on one of so many ranks."""
        return reserve(ranks, replicas) if self.reserve is None else self.reserve

    def room(self, ranks: int, replicas: int) -> float:
        """Bytes that tensors can have on one of so many ranks."""
        return (self.memory - self.kept(ranks, replicas)) * GIB


def kinds_of(config: Config, silent: Collection[int] = (0,)) -> list[Kind]:
    """Those that tell the cost of all, and the most demanding.

    silent: numbers of the anchors at which the adversary does not play, 0 is the noisiest.
    """
    p, walks = config.backward_simulation.probability, config.anchors.walks
    num, rolls = walks[-1], rolls_out(config)
    last = num - 1
    found = [Kind(True, anchor, True, num) for anchor in sorted({0, 1, last}) if rolls]
    for generator in (False,) if rolls else (True, False):
        found.append(Kind(generator, 0, False, num))
        if last > 0 and p < 1:
            found.append(Kind(generator, 1, False, num))
        if last > 0 and p > 0 and (generator or p == 1 or rolls):
            found.append(Kind(generator, last, True, num))
    known = {losses(config, kind, silent) for kind in found}
    for generator, steps in product((True, False), reversed(walks)):
        for anchor in range(steps):  # the top one too: of one step it is also the last
            rolled = generator and rolls
            kind = Kind(generator, anchor, rolled or (p == 1 and anchor > 0), steps)
            if (own := losses(config, kind, silent)) not in known:
                found.append(kind)
                known.add(own)
    return found


def likely_worst_first(kinds: Sequence[Kind]) -> list[Kind]:
    """First a generator turn, below the top anchor where there is one."""
    return sorted(kinds, key=lambda kind: (not kind.generator, kind.anchor == 0))


def rolls_out(config: Config) -> bool:
    """Whether a generator turn has a rollout."""
    return config.reward.weight > 0


def losses(config: Config, kind: Kind, silent: Collection[int]) -> tuple[int, ...]:
    """What kinds have in common whose cost differs by the way to x_tau alone."""
    plays = kind.anchor * (len(config.anchors.times) // kind.steps) not in silent
    rolled = kind.generator and rolls_out(config)
    reflected = kind.generator and config.reflects(kind.anchor, kind.steps)
    # of a rollout's steps the last one has no density: x's own prediction is none that trains
    without_density = rolled and kind.anchor == kind.steps - 1
    top = kind.anchor == 0
    return kind.generator, top, plays, reflected, without_density, rolled * kind.steps


@dataclass(frozen=True)
class Costs:
    """The traced iterations of a configuration on one rank."""

    config: Config
    traced: dict[Kind, Phases]
    silent: Collection[int] = (0,)  # as kinds_of

    def at(self, kind: Kind, quantity: Quantity) -> float:
        """A quantity that adds up over phases (FLOPs, bytes), of an iteration of any kind."""
        if kind in self.traced:
            return self._total(kind, quantity)
        num, rolls = self.config.anchors.walks[-1], rolls_out(self.config)
        last = num - 1
        own = losses(self.config, kind, self.silent)
        like = next(k for k in self.traced if losses(self.config, k, self.silent) == own)
        if kind.anchor == 0 or (kind.generator and rolls):  # there is one way
            return self._total(like, quantity)
        if kind.simulate:
            top = self._way(Kind(not rolls, 0, False, num), quantity)
            # to anchor k it is k forwards of the student: the deepest one tells what each costs
            forward = (self._way(Kind(not rolls, last, True, num), quantity) - top) / last
            way = top + kind.anchor * forward
        else:
            way = self._way(Kind(kind.generator, 1, False, num), quantity)
        return self._total(like, quantity) - self._way(like, quantity) + way

    def mean(self, quantity: Quantity) -> float:
        """The mean over the recipe's iterations."""
        p, walks = self.config.backward_simulation.probability, self.config.anchors.walks
        often, total = 1 / self.config.fake_score.ttur, 0.0
        for generator, share in ((True, often), (False, 1 - often)):
            for steps, anchor in ((n, anchor) for n in walks for anchor in range(n)):
                for simulate, chance in ((True, p), (False, 1 - p)):
                    if chance > 0:
                        kind = Kind(generator, anchor, simulate, steps)
                        total += share / len(walks) / steps * chance * self.at(kind, quantity)
        return total

    def worst(self) -> Kind:
        """The kind with the highest peak."""
        return max(self.traced, key=lambda kind: peak(self.traced[kind]))

    def _way(self, kind: Kind, quantity: Quantity) -> float:
        return quantity(self.traced[kind]["generate"])

    def _total(self, kind: Kind, quantity: Quantity) -> float:
        return sum(quantity(cost) for cost in self.traced[kind].values())


def peak(phases: Phases) -> int:
    """Bytes at the worst moment of an iteration."""
    return max(cost.peak for cost in phases.values())


def flops(cost: PhaseCost) -> float:
    """FLOPs of matrix products, convolutions and attention."""
    return cost.flops


def work_of(name: str) -> Quantity:
    """FLOPs of a network's forwards, or of a phase's backward."""
    return lambda cost: cost.work[name]


def sent(collective: str) -> Quantity:
    """Bytes of whole tensors that a collective gathers or reduces."""
    return lambda cost: cost.sent[collective]


def seconds(num_flops: float, gpu: str, mfu: float) -> float:
    """Time of so many FLOPs on one GPU."""
    return num_flops / (mfu * DENSE_TFLOPS[gpu] * 1e12)
