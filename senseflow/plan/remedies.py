"""What makes a run fit that does not, each change traced again."""

import logging
from dataclasses import dataclass, replace

from senseflow.config.config import Config
from senseflow.plan.blank import PlanData
from senseflow.plan.costs import Gpu
from senseflow.plan.plan import Plan, Wanted, make_plan

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Change:
    """Of the configuration, or, where `cached`, of what is read in the place of images."""

    words: str
    price: str
    overrides: tuple[str, ...]  # as a training script takes them
    cached: bool = False
    may_add: bool = False  # to a peak
    may_fail: bool = False  # it is not for every network, or not installed: ValueError


@dataclass(frozen=True)
class Remedy:
    """A change, and the peak with it."""

    words: str
    overrides: tuple[str, ...]  # or flags
    peak: int  # bytes
    fits: bool


def candidates(plan: Plan) -> list[Change]:
    """Changes that this configuration has not made yet and that keep the method.

    In the order of what they cost: first those that leave the student what it is, by time, then
    those that do not, by how far the release goes too (docs/fidelity.md).
    """
    return exact(plan.config, plan.wanted.world_size, plan.data) + inexact(plan.config)


def exact(config: Config, world_size: int, data: PlanData) -> list[Change]:
    """Those that change no loss but for the order of sums."""
    train, parallel, found = config.train, config.parallel, []
    if not parallel.reshard_after_forward:
        words, price = "networks resharded after every pass", "gatherings, and the host's time"
        found.append(Change(words, price, ("parallel.reshard_after_forward=true",)))
    most = most_accumulation(config, world_size)
    if train.grad_accumulation < most:
        words, fewest = "as few samples at a time as can be", f"train.grad_accumulation={most}"
        # Gradients wait for the next micro-batch: they may be more than the samples it spares.
        found.append(Change(words, "small kernels", (fewest,), may_add=True))
    if data == "prompts" or (data == "images" and config.data.crop == "center"):
        what = "prompts" if data == "prompts" else "prompts and latents"
        words, price = f"{what} from a cache", "disk, and a command before"
        folder = f"paths.cache=runs/{config.recipe}_cache"
        found.append(Change(words, price, (folder,), cached=True))
    if parallel.replicas > 1:
        words, price = "shards over all GPUs", "shards cross nodes"
        found.append(Change(words, price, ("parallel.replicas=1",)))
    every, wholly = "parallel.activation_checkpointing=1", "parallel.recomputation=full"
    if parallel.activation_checkpointing == 0:
        words, price = "every block recomputed but for its matrix products", "time, a little"
        found.append(Change(words, price, (every, "parallel.recomputation=selective")))
    if (parallel.activation_checkpointing, parallel.recomputation) != (1, "full"):
        words, price = "every block recomputed whole", "time, a forward of what learns"
        found.append(Change(words, price, (every, wholly)))
    return found


def inexact(config: Config) -> list[Change]:
    """Those that round, or leave something out."""
    found, precision, optimizer = [], config.precision, config.optimizer
    heads = config.adversarial.in_use != "none"
    if heads and (optimizer.head_states or optimizer.states) != "8bit":
        words, price = "the heads' moments in 8 bits", "noise in the adversary's moments"
        found.append(Change(words, price, ("optimizer.head_states=8bit",)))
    if optimizer.states != "8bit":
        words, price = "the optimizers' moments in 8 bits", "noise in the moments"
        as_all = ("optimizer.head_states=null",) if heads else ()  # the change before is then none
        found.append(Change(words, price, (*as_all, "optimizer.states=8bit")))
    if precision.masters == "float32" and config.lora.rank is None:
        words, price = "masters in bfloat16", "noise of stochastic rounding"
        found.append(Change(words, price, ("precision.masters=bfloat16",)))
    if precision.head_masters == "float32" and heads:
        words, price = "the heads' masters in bfloat16", "noise of stochastic rounding"
        found.append(Change(words, price, ("precision.head_masters=bfloat16",)))
    if precision.vae == "float32":
        words, price = "the VAE in bfloat16", "digits of images and of their gradients"
        found.append(Change(words, price, ("precision.vae=bfloat16",)))
    if precision.heads == "float32" and heads:
        words, price = "the heads compute in bfloat16", "digits of the adversary"
        found.append(Change(words, price, ("precision.heads=bfloat16",)))
    if config.lora.rank is not None and config.lora.base == "bfloat16":
        words, price = "the frozen base in 8 bits", "digits of the teacher, and time"
        found.append(Change(words, price, ("lora.base=int8",)))
    if config.lora.rank is not None and config.lora.base != "nf4":
        words, price = "the frozen base in 4 bits", "a rounded teacher, and time"
        found.append(Change(words, price, ("lora.base=nf4",), may_fail=True))
    if config.ema.decay:
        found.append(Change("no EMA", "the averaged student", ("ema.decay=null",)))
    return found


def most_accumulation(config: Config, world_size: int) -> int:
    """The most micro-batches that a rank's samples can be: of one each, or, where references are
    shuffled among them, of two or more."""
    samples = config.train.batch_size // world_size
    shuffled = config.adversarial.in_use == "vfm" and config.adversarial.reference == "shuffled"
    sizes = (size for size in range(1 + shuffled, samples + 1) if samples % size == 0)
    return samples // next(sizes, samples)


def together(changes: tuple[Change, ...]) -> tuple[str, ...]:
    """The overrides of changes; of those of one key the last."""
    pairs = (override.split("=", 1) for change in changes for override in change.overrides)
    return tuple(f"{key}={value}" for key, value in dict(pairs).items())


def passed_over(change: Change, error: ValueError) -> None:
    """Say why a change that is not for this run is none of its remedies; raise what else it is."""
    if not change.may_fail:
        raise error
    logger.warning("%s: not tried: %s", change.words, error)


def changed(wanted: Wanted, changes: tuple[Change, ...]) -> Wanted:
    """What is to be planned with these changes."""
    made = together(tuple(change for change in changes if not change.cached))
    cached = any(change.cached for change in changes)
    data: PlanData | None = "cached" if cached else wanted.data
    return replace(wanted, overrides=(*wanted.overrides, *made), data=data)


def remedies(plan: Plan, gpu: Gpu) -> list[Remedy]:
    """The candidates' peaks at the plan's worst kind of iteration, and those of twice the GPUs and
    so on, up to 64, until one fits."""
    kind, singles, found = plan.costs.worst(), list[Change](), list[Remedy]()

    def tried(words: str, overrides: tuple[str, ...], wanted: Wanted) -> Remedy:
        again = make_plan(wanted, [kind])
        return Remedy(words, overrides, again.peak, again.fits(gpu))

    for change in candidates(plan):
        try:
            found.append(tried(change.words, change.overrides, changed(plan.wanted, (change,))))
            singles.append(change)
        except ValueError as error:
            passed_over(change, error)
    if len(singles) > 1:
        every = tuple(singles)
        found.append(tried("all of these", together(every), changed(plan.wanted, every)))
    more, fits = plan.wanted, plan.fits(gpu)
    while not fits and more.world_size < 64:
        more = twice(more, plan.config)
        shape = (f"--nodes {more.nodes}", f"--gpus {more.gpus}", more.overrides[-1])
        found.append(tried("more GPUs, as many samples on each", shape, more))
        fits = found[-1].fits
    return found


def twice(wanted: Wanted, config: Config) -> Wanted:
    """Twice the GPUs, at most 8 on a node, and the same share of the batch on each."""
    gpus, nodes = wanted.gpus, wanted.nodes
    gpus, nodes = (2 * gpus, nodes) if 2 * gpus <= 8 else (gpus, 2 * nodes)
    samples = config.train.batch_size * nodes * gpus // wanted.world_size
    batch = f"train.batch_size={samples}"
    kept = tuple(o for o in wanted.overrides if not o.startswith("train.batch_size="))
    return replace(wanted, nodes=nodes, gpus=gpus, overrides=(*kept, batch))
