"""What makes a run fit that does not, each change traced again."""

from dataclasses import dataclass, replace

from senseflow.config.config import Config
from senseflow.plan.plan import Plan, Wanted, make_plan


@dataclass(frozen=True)
class Remedy:
    """A change of the configuration, and the peak with it."""

    words: str
    overrides: tuple[str, ...]  # or flags
    peak: int  # bytes


def candidates(config: Config, world_size: int) -> list[tuple[str, tuple[str, ...]]]:
    """Changes that this configuration has not made yet and that keep the method."""
    train = config.train
    found: list[tuple[str, tuple[str, ...]]] = []
    most = train.batch_size // world_size
    if train.grad_accumulation < most:
        found.append(("one sample at a time", (f"train.grad_accumulation={most}",)))
    parallel, wholly = config.parallel, "parallel.recomputation=full"
    if parallel.activation_checkpointing != 1:
        words = "every block recomputed"
        found.append((words, ("parallel.activation_checkpointing=1", wholly)))
    elif parallel.recomputation != "full":
        found.append(("every block recomputed whole", (wholly,)))
    if config.precision.vae == "float32":
        found.append(("the VAE in bfloat16", ("precision.vae=bfloat16",)))
    if config.precision.heads == "float32" and config.adversarial.in_use != "none":
        found.append(("the heads compute in bfloat16", ("precision.heads=bfloat16",)))
    if config.optimizer.states != "8bit":
        found.append(("the optimizers' moments in 8 bits", ("optimizer.states=8bit",)))
    if config.precision.masters == "float32" and config.lora.rank is None:
        found.append(("masters in bfloat16", ("precision.masters=bfloat16",)))
    if config.ema.decay:
        found.append(("no EMA", ("ema.decay=null",)))
    if config.parallel.replicas > 1:
        found.append(("shards over all GPUs", ("parallel.replicas=1",)))
    if len(found) > 1:
        found.append(("all of these", tuple(o for _, overrides in found for o in overrides)))
    return found


def remedies(plan: Plan, room: float) -> list[Remedy]:
    """The candidates' peaks at the plan's worst kind of iteration, and those of twice the GPUs and
    so on, up to 64, until one fits. room: bytes."""
    wanted, kind = plan.wanted, plan.costs.worst()

    def peak_of(changed: Wanted) -> int:
        return make_plan(changed, [kind]).peak

    found = []
    for words, overrides in candidates(plan.config, wanted.world_size):
        changed = replace(wanted, overrides=(*wanted.overrides, *overrides))
        found.append(Remedy(words, overrides, peak_of(changed)))
    more, least = wanted, plan.peak
    while least > room and more.world_size < 64:
        more = twice(more, plan.config)
        least = peak_of(more)
        shape = (f"--nodes {more.nodes}", f"--gpus {more.gpus}", more.overrides[-1])
        found.append(Remedy("more GPUs, as many samples on each", shape, least))
    return found


def twice(wanted: Wanted, config: Config) -> Wanted:
    """Twice the GPUs, at most 8 on a node, and the same share of the batch on each."""
    gpus, nodes = wanted.gpus, wanted.nodes
    gpus, nodes = (2 * gpus, nodes) if 2 * gpus <= 8 else (gpus, 2 * nodes)
    samples = config.train.batch_size * nodes * gpus // wanted.world_size
    batch = f"train.batch_size={samples}"
    kept = tuple(o for o in wanted.overrides if not o.startswith("train.batch_size="))
    return replace(wanted, nodes=nodes, gpus=gpus, overrides=(*kept, batch))
