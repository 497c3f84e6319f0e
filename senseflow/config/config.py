"""The configuration of a run: a tree of frozen dataclasses, read strictly from one YAML file.

Every number of a recipe stands in its YAML; the fields without a default must be given there. An
unknown key, a wrong type or an impossible combination is a ValueError that names the file, the key
and the nearest valid key, before anything is loaded. What a section refuses of itself stands in
`config.sections`, what several must agree on here.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from senseflow.common.fields import leaves
from senseflow.common.files import write_whole
from senseflow.config.recipes import require_recipe
from senseflow.config.sections import (
    AdversarialConfig,
    AnchorsConfig,
    BackwardSimulationConfig,
    DataConfig,
    DmdConfig,
    EmaConfig,
    FakeScoreConfig,
    IdaConfig,
    IsgConfig,
    LogConfig,
    LoraConfig,
    LrSchedulerConfig,
    OptimizerConfig,
    ParallelConfig,
    PathsConfig,
    PrecisionConfig,
    RewardConfig,
    StudentConfig,
    TrainConfig,
    require,
)
from senseflow.config.strict_yaml import Removed, build, read_tree
from senseflow.config.yaml_text import dump_yaml
from senseflow.core.names import BaseForm


@dataclass(frozen=True)
class Config:
    """All settings of one run, grouped as in its YAML."""

    recipe: str  # which script runs it
    paths: PathsConfig
    train: TrainConfig
    optimizer: OptimizerConfig
    anchors: AnchorsConfig
    dmd: DmdConfig
    fake_score: FakeScoreConfig
    ida: IdaConfig
    isg: IsgConfig
    adversarial: AdversarialConfig
    backward_simulation: BackwardSimulationConfig
    data: DataConfig
    lr_scheduler: LrSchedulerConfig = field(default_factory=LrSchedulerConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    log: LogConfig = field(default_factory=LogConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)

    def __post_init__(self) -> None:
        require_recipe(self.recipe)
        adversary = self.adversarial.in_use
        require(
            self.dmd.weight + self.isg.weight > 0 or adversary != "none" or self.reward.in_use,
            "dmd.weight and isg.weight are 0 and there is no adversary: the generator has no loss",
        )
        strange = [t for t in self.reward.anchors or () if t not in self.anchors.times]
        require(
            not strange,
            f"reward.anchors {strange} are none of anchors.times {list(self.anchors.times)}",
        )
        self._require_groups()
        require(
            adversary != "bottleneck" or self.dmd.weight > 0,
            "adversarial.kind bottleneck stands on the fake score: dmd.weight must be positive",
        )
        require(
            adversary != "vfm" or not self.data.separate_real,
            "data.separate_real: the vfm adversary compares a prompt's image with its own real one",
        )
        require(
            self.lora.rank is None or self.paths.student_config is None,
            "lora.rank: a LoRA student has its teacher's config.json; say null for "
            "paths.student_config",
        )
        require(
            self.lora.rank is None
            or (self.precision.masters == "float32" and self.parallel.offload != "trained"),
            "lora.rank: adapters are small and stay float32 on the device; say float32 for "
            "precision.masters, and none or heads for parallel.offload (the heads have keys of "
            "their own: precision.head_masters, optimizer.head_states)",
        )
        spent = self.lr_scheduler.warmup_iterations + self.lr_scheduler.decay_iterations
        require(
            spent <= self.train.iter_num,
            f"lr_scheduler: warm-up and decay take {spent} iterations of {self.train.iter_num}; "
            "say lr_scheduler.warmup_iterations=0 lr_scheduler.decay_iterations=0, or a larger "
            "train.iter_num",
        )
        rates = self.optimizer
        fastest = max(rates.lr, rates.fake_score_lr, rates.discriminator_lr)
        require(
            fastest * rates.weight_decay < 1,
            f"optimizer.weight_decay {rates.weight_decay:g}: at a learning rate of {fastest:g} "
            "every step would take more of a weight than there is; their product must be below 1",
        )

    def reflects(self, anchor: int, steps: int) -> bool:
        """Whether theta has the rewards' own gradient at an anchor (0: the noisiest) of so many."""
        times = self.anchors.of_walk(steps)
        return self.reward.last_weight > 0 and times[anchor] in (self.reward.anchors or times[-1:])

    def _require_groups(self) -> None:
        """Rollouts need steps with noise, and whole groups."""
        reward, steps = self.reward, self.anchors.walks[0] - 1
        if reward.weight == 0:
            return
        require(
            steps > 0,
            "reward.weight: sampling in one step has none with noise; train for rewards by "
            "reward.last_weight, or name two anchors.times or more, and no anchors.steps of 1",
        )
        require(
            reward.transitions <= steps,
            f"reward.transitions {reward.transitions}: sampling in {steps + 1} steps has {steps} "
            "with noise; the last has none",
        )
        require(
            self.train.batch_size % reward.group_size == 0,
            f"train.batch_size {self.train.batch_size} is not a multiple of reward.group_size "
            f"{reward.group_size}",
        )


REMOVED = {
    "isg.midpoint": Removed("uniform", "0.1.0", "mid-points are uniform (docs/ablation.md)"),
    "isg.error_curve": Removed(None, "0.1.0", "mid-points are uniform (docs/ablation.md)"),
}
"""Keys of older files, which still load."""


def load_config(file: str | Path, overrides: list[str] | None = None) -> Config:
    """Read `file`, apply `key.sub=value` overrides, and check all of it.

    Raises ValueError naming the file and key for an unknown key, a missing one, a wrong type or an
    impossible combination.
    """
    return build_config(read_tree(Path(file), overrides), Path(file))


def build_config(tree: dict[str, Any], file: Path) -> Config:
    """The configuration of `strict_yaml.read_tree(file)`; raises ValueError, naming the file."""
    return build(Config, tree, file, REMOVED)


def require_same_base(lora: LoraConfig, before: BaseForm, where: Path) -> None:
    """Raise ValueError where adapters are to go on on a base of another form, unasked.

    before: the form of the base that those in `where` were trained on.
    """
    if lora.rank is not None and lora.base != before and not lora.change_base:
        raise ValueError(
            f"lora.base {lora.base}: the adapters in {where} were trained on a base in {before}, "
            f"which rounds its weights otherwise; say lora.base={before}, or lora.change_base=true "
            "to go on all the same"
        )


def save_config(config: Config, file: Path) -> None:
    """Write the resolved configuration so that `load_config` reads the same one back."""
    tree = json.loads(json.dumps(dataclasses.asdict(config)))  # lists for tuples
    write_whole(file, dump_yaml(tree))


def differences(config: Config, other: Config) -> list[str]:
    """`key: value here, value there` for every leaf in which two configurations differ."""
    here, there = leaves(dataclasses.asdict(config)), leaves(dataclasses.asdict(other))
    return [f"{key}: {here[key]} -> {there[key]}" for key in here if here[key] != there[key]]
