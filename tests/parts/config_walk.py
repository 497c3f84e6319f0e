"""What every field of the configuration makes of values that nobody means, in a table.

`python tests/parts/config_walk.py` (PYTHONPATH=.) prints it as markdown.
"""

import copy
import dataclasses
import re
import runpy
import time
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from senseflow.config.config import Config, build_config
from senseflow.config.load import check_split
from senseflow.config.recipes import RECIPES
from senseflow.config.strict_yaml import is_union, read_tree
from senseflow.config.yaml_text import parse_yaml
from senseflow.engine.inputs import bottleneck_of, read_setup

VALUES = ("-1", "0", ".nan", ".inf", "1e30", "null", "off", "'off'", "true", "[1, 2]")
"""As a YAML has them; 1e30 is written out where a whole number is asked for."""

FLUX = Path("configs/FLUX/flux_senseflow_tiny.yaml")
DMD2 = Path("configs/sdxl/sdxl_dmd2_tiny.yaml")
REWARDED = ("reward.weight=1", "reward.last_weight=1", "reward.models=[pick_score]")
OF_DMD2 = {f"adversarial.{key}" for key in ("time_range", "downsamplings", "norm_groups")}

GUIDANCE = "the teacher without a prompt, or FLUX's embedding of 0"
REASONS = {
    ("train.seed", "0"): "a seed like any other",
    ("train.keep_last", "0"): "all are kept",
    ("train.max_skipped", "0"): "the first step that is not finite stops the run",
    ("optimizer.betas", "0"): "no averaging of gradients",
    ("optimizer.betas[0]", "0"): "no momentum, as in RMSprop",
    ("optimizer.betas[1]", "0"): "no memory of squares: sign descent",
    ("optimizer.weight_decay", "0"): "none",
    ("lr_scheduler.warmup_iterations", "0"): "none",
    ("lr_scheduler.start_factor", "0"): "the warm-up begins at 0; its first iteration is above",
    ("lr_scheduler.decay_iterations", "0"): "none",
    ("lr_scheduler.end_factor", "0"): "the decay ends at 0, in the last iteration",
    ("student.fold_guidance", "0"): GUIDANCE,
    ("student.guidance", "0"): GUIDANCE,
    ("dmd.weight", "0"): "no L_DMD, while there is another loss",
    ("dmd.guidance", "0"): GUIDANCE,
    ("dmd.guidance[0]", "0"): GUIDANCE,
    ("dmd.guidance", "[1, 2]"): "a range",
    ("dmd.time_range", "[1, 2]"): "a range",
    ("dmd.time_range[0]", "0"): "the clock's end",
    ("fake_score.time_range", "[1, 2]"): "a range",
    ("fake_score.time_range[0]", "0"): "the clock's end",
    ("ida.lam", "0"): "phi becomes theta",
    ("isg.weight", "0"): "off",
    ("isg.guidance", "0"): GUIDANCE,
    ("isg.guidance[0]", "0"): GUIDANCE,
    ("isg.guidance", "[1, 2]"): "a range",
    ("isg.margin", "0"): "mid-points up to the anchors",
    ("adversarial.weight", "0"): "no adversary is built",
    ("adversarial.omega_power", "0"): "omega is 1 at every anchor",
    ("adversarial.least_omega", "0"): "it plays at every anchor whose omega is not 0",
    ("adversarial.taps", "[1, 2]"): "two blocks",
    ("adversarial.taps[0]", "0"): "the first block",
    ("adversarial.time_range", "[1, 2]"): "a range",
    ("adversarial.time_range[0]", "0"): "the clock's end",
    ("adversarial.downsamplings", "0"): "the head's last convolution reads the bottleneck",
    ("backward_simulation.probability", "0"): "always from data",
    ("parallel.activation_checkpointing", "0"): "nothing is recomputed",
    ("reward.weight", "0"): "no rollouts",
    ("reward.last_weight", "0"): "none",
    ("data.num_workers", "0"): "the training process reads",
    ("data.max_unreadable", "0"): "the first unreadable file stops the run",
    ("log.sample_interval", "0"): "no strips",
}
"""Why a number or a list is legal that a careless hand may have written."""
GENERAL = {
    "off": "false",
    "true": "true",
    "'off'": "a name or a path: asked for when it is opened",
}


@dataclass(frozen=True)
class Step:
    """One value in one place."""

    key: str  # with [i] where one number of a list is replaced
    value: str
    refusal: str | None  # None: legal
    seconds: float  # of the processor

    @property
    def reason(self) -> str | None:
        """Why it is legal; None: nobody has said."""
        if self.value == "null":
            said = re.search(r"null: ([^;]+)", meanings()[self.key])
            return said[1] if said else "none"
        return GENERAL.get(self.value) or REASONS.get((self.key, self.value))


def walk() -> Iterator[Step]:
    """Every value in every place."""
    for section, cls in typing.get_type_hints(Config).items():
        if not dataclasses.is_dataclass(cls):
            yield from (step((section,), None, value) for value in VALUES)
            continue
        for name, hint in typing.get_type_hints(cls, include_extras=True).items():
            path = section, name
            yield from (step(path, None, value, is_int(hint)) for value in VALUES)
            listed = tree_for(path)[section].get(name)
            for index in range(len(listed) if isinstance(listed, list) else 0):
                if index < 2:
                    yield from (step(path, index, value, is_int(hint)) for value in VALUES)


def step(path: tuple[str, ...], index: int | None, value: str, is_whole: bool = False) -> Step:
    """One value in one place: read as the launcher reads, but for the data."""
    tree = copy.deepcopy(tree_for(path))
    place = tree if len(path) == 1 else tree[path[0]]
    new = 10**30 if value == "1e30" and is_whole else parse_yaml(value, "")
    if index is None:
        place[path[-1]] = new
    else:
        place[path[-1]][index] = new
    key = ".".join(path) + ("" if index is None else f"[{index}]")
    began = time.process_time()
    try:
        config = build_config(tree, Path("a.yaml"))
        check_split(config, 1)
        setup = read_setup(config, RECIPES[config.recipe].family)
        if config.adversarial.in_use == "bottleneck":
            bottleneck_of(setup)
        refusal = None
    except ValueError as error:
        refusal = str(error)
    return Step(key, value, refusal, time.process_time() - began)


def tree_for(path: tuple[str, ...]) -> dict[str, Any]:
    """The settings in which a place counts."""
    key = ".".join(path)
    if key in OF_DMD2:
        return base(DMD2)
    if path[0] == "reward":
        return base(FLUX, *REWARDED)
    return base(FLUX, "lora.rank=4") if path[0] == "lora" else base(FLUX)


@cache
def base(file: Path, *overrides: str) -> dict[str, Any]:
    """A configuration with every pair as two numbers."""
    pairs = ("dmd.guidance=[1, 8]", "dmd.time_range=[20, 980]", "train.resolution=[32, 32]")
    return read_tree(file, [*pairs, *overrides])


@cache
def meanings() -> dict[str, str]:
    """The comment beside every field, by its key."""
    generator = runpy.run_path("docs/configuration.py")
    comments = generator["read_comments"](*generator["SOURCES"])
    sections = {cls.__name__: section for section, cls in typing.get_type_hints(Config).items()}
    return {
        f"{sections[cls]}.{key}": said for (cls, key), said in comments.items() if cls in sections
    }


def is_int(hint: Any) -> bool:
    """Whether whole numbers are asked for, alone or in a list."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Annotated, tuple) or is_union(hint):
        return is_int(args[0])
    return hint is int


def table() -> str:
    """The verdicts, a row for every place, and why what is legal is."""
    rows: dict[str, dict[str, Step]] = {}
    for one in walk():
        rows.setdefault(one.key, {})[one.value] = one
    lines = ["| key | " + " | ".join(f"`{v}`" for v in VALUES) + " | why what is taken is |"]
    lines += ["|" + "---|" * (len(VALUES) + 2)]
    for key, steps in rows.items():
        taken = [one for one in steps.values() if one.refusal is None]
        cells = ["taken" if steps[v].refusal is None else "refused" for v in VALUES]
        why = "; ".join(f"`{one.value}`: {one.reason}" for one in taken)
        lines.append(f"| `{key}` | " + " | ".join(cells) + f" | {why} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
