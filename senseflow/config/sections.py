"""The sections of a configuration, a frozen dataclass each, and what each refuses of itself.

What several sections must agree on is `Config`'s. The comment beside a field is its meaning in
docs/configuration.md, which `python docs/configuration.py` writes.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from senseflow.common.fields import (
    Bounds,
    Count,
    CountOrNone,
    Fraction,
    Guidance,
    Order,
    PathName,
    Pixels,
    Seed,
    Share,
    SmallCount,
    Workers,
)
from senseflow.core.names import BaseForm, IsgLoss, NormSchedule, States, TextLayer, TimeLaw

Iterations = Annotated[int, Bounds(1, 10**7 - 1)]  # seven digits in the names of checkpoints
Positive = Annotated[float, Bounds(0, 1e6, above=True)]
Weight = Annotated[float, Bounds(0, 1e6)]
Beta = Annotated[float, Bounds(0, 1, below=True)]
Decay = Annotated[float, Bounds(0, 1, above=True, below=True)]
Power = Annotated[float, Bounds(0, 100)]
Shift = Annotated[float, Bounds(0, 100, above=True)]
Time = Annotated[float, Bounds(0, 1000)]  # thousandths of the teacher's clock
Block = Annotated[int, Bounds(0, 1000)]
Halvings = Annotated[int, Bounds(0, 16)]
GroupSize = Annotated[int, Bounds(2, 2**16)]  # of 1, an advantage has no mean to compare with
Few = Annotated[int, Bounds(1, 64)]
GuidanceRange = Annotated[tuple[Guidance, Guidance], Order("[low, high]")]
Offload = Literal["none", "trained", "heads"]
Taps = Annotated[tuple[Block, ...], Order("rising")]
Times = Annotated[tuple[Time, ...], Order("falling")]
Steps = Annotated[tuple[Few, ...], Order("not falling")]
TimeRange = Annotated[tuple[Time, Time], Order("[low, high], not equal")]


def require(condition: bool, message: str) -> None:
    """Raise ValueError(message) where the condition does not hold."""
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True)
class PathsConfig:
    """Where the networks and the data are; folders of diffusers, files, or names timm knows."""

    pretrained_model: PathName  # the teacher's diffusers folder
    dataset: PathName  # JSON with keys, image_paths, prompts; LMDB folder of latents; or prompts
    student_config: PathName | None = None  # config.json of student and fake score; None: teacher's
    flux_wo_guidance_embed: PathName | None = None  # folder with transformer/ linked to teacher's
    initial: PathName | None = None  # a run or a student to begin with in the teacher's place
    cache: PathName | None = None  # folder of python -m senseflow.cache, in place of the encoders
    dinov2: PathName = "vit_large_patch14_dinov2.lvd142m"  # timm name (v3 too) or local-dir:FOLDER
    dinov2_weights: PathName | None = None  # a weights file; None: what the name stands for
    clip: PathName = "ViT-L-14"  # open_clip name, or local-dir:FOLDER
    clip_weights: PathName | None = "openai"  # open_clip tag or a weights file
    clip_quick_gelu: bool | None = None  # the activation of a weights file; None: what the tag says


@dataclass(frozen=True)
class TrainConfig:
    """The length, batch, seed and rhythm of the run; all intervals in loop iterations."""

    iter_num: Iterations  # length of the run; raise it to go on with a finished one
    batch_size: SmallCount  # global: over all ranks and micro-batches
    resolution: tuple[Pixels, Pixels]  # height, width in pixels
    save_interval: Count  # iterations between checkpoints
    log_interval: Count = 10  # iterations between rows of stats.jsonl
    seed: Seed = 0  # of every random number of the run
    grad_accumulation: SmallCount = 1  # micro-batches per process and iteration
    keep_last: CountOrNone = 2  # checkpoints; 0 keeps all
    max_skipped: CountOrNone = 3  # steps of a network in a row that are not finite; 0: stop at one
    async_save: bool = False  # write checkpoints while training goes on; costs host memory
    deterministic: bool = False  # the same bits on GPUs too, at some cost in speed
    time_limit: Positive | None = None  # hours since the launch; then the run saves and stops


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW for the generator, the fake score and the heads."""

    lr: Fraction  # of the generator
    fake_score_lr: Fraction  # of the fake score
    discriminator_lr: Fraction  # of the discriminator's heads
    betas: tuple[Beta, Beta] = (0.9, 0.999)  # AdamW's, of all three
    eps: Fraction = 1e-8  # AdamW's, of all three
    weight_decay: Weight = 0.0  # AdamW's, of all three
    max_grad_norm: Positive = 1.0  # each network's gradient is clipped to this norm
    states: States = "float32"  # how the moments are kept
    head_states: States | None = None  # how those of the heads are; None: as states


@dataclass(frozen=True)
class LrSchedulerConfig:
    """Linear from start_factor to 1 over the warm-up, constant, then linear to end_factor. Beside
    IDA a decay leaves a bias (docs/method.md, section 9)."""

    warmup_iterations: CountOrNone = 0  # the first ones of the run
    start_factor: Share = 1.0  # of the learning rates at the start of the warm-up
    decay_iterations: CountOrNone = 0  # the last ones of the run
    end_factor: Share = 1.0  # of the learning rates at the end of the run


@dataclass(frozen=True)
class AnchorsConfig:
    """The anchors: `times` on the unshifted clock, then the teacher's own shift. A student of many
    samples in fewer steps too, and `steps` trains it for each; named twice, twice as often."""

    times: Times  # thousandths, from noisy to clean, before the shift
    shift: Shift | None = None  # None: the scheduler's own at the resolution
    steps: Steps | None = None  # to sample in, one number an iteration; None: one per anchor

    def __post_init__(self) -> None:
        num = len(self.times)
        require(
            self.walks[-1] == num and all(num % steps == 0 for steps in self.walks),
            f"anchors.steps {list(self.walks)}: each divides the number of anchors.times, {num}, "
            "and the last is all of them, or some would never be trained",
        )

    @property
    def walks(self) -> tuple[int, ...]:
        """The numbers of steps it is trained for, each as often as it is drawn."""
        return self.steps or (len(self.times),)

    def of_walk(self, steps: int) -> Times:
        """The times of sampling in so many steps."""
        return self.times[:: len(self.times) // steps]


@dataclass(frozen=True)
class StudentConfig:
    """How student and fake score start from the teacher's weights."""

    fold_guidance: Guidance | None = None  # fold this guidance into the time embedding's bias
    guidance: Guidance | None = None  # LoRA on FLUX: the constant its embedding is fed


@dataclass(frozen=True)
class LoraConfig:
    """Student and fake score as adapters of the frozen teacher."""

    rank: SmallCount | None = None  # of the adapters; None: student and fake score are whole
    alpha: Positive | None = None  # the scale is alpha / rank; None: 1
    train: Literal["B", "AB"] = "B"  # B: with one fixed A for both; AB: A and B of each
    targets: tuple[str, ...] = ()  # ends of the names of linear layers and convolutions
    base: BaseForm = "bfloat16"  # the frozen blocks' linear layers; bfloat16: as precision.compute
    change_base: bool = False  # go on with a run whose base was in another form

    def __post_init__(self) -> None:
        require(
            self.rank is not None or self.base == "bfloat16",
            f"lora.base {self.base}: in full training every weight learns, and none can be packed; "
            "name a lora.rank, or say lora.base=bfloat16",
        )
        require(
            self.rank is None or len(self.targets) > 0,
            "lora.targets is empty: name the layers that get adapters, such as [to_q, to_k]",
        )


@dataclass(frozen=True)
class DmdConfig:
    """L_DMD: weight, the teacher's guidance, the law of t (thousandths)."""

    weight: Weight  # of L_DMD in the loss of the generator; 0: none, no fake score is trained
    guidance: GuidanceRange  # the teacher's, drawn per sample
    time: TimeLaw  # law of t
    time_range: TimeRange = (0.0, 1000.0)  # of t, in thousandths of the teacher's clock
    floor: Fraction = 1e-4  # of mean |x - x_0_real|, by which the gradient is divided


@dataclass(frozen=True)
class FakeScoreConfig:
    """L_fake: the law of t, and N, the iterations per generator update (TTUR)."""

    ttur: Count  # N: iterations, each a step of the fake score, per update of the generator
    time: TimeLaw  # law of t
    time_range: TimeRange = (0.0, 1000.0)  # of t, in thousandths of the teacher's clock


@dataclass(frozen=True)
class IdaConfig:
    """IDA's lambda; None switches it off. It needs learning rates that do not decay
    (docs/method.md, section 9)."""

    lam: Share | None  # phi <- lam phi + (1 - lam) theta; None: off


@dataclass(frozen=True)
class EmaConfig:
    """The average of the student's weights over its moves; None switches it off."""

    decay: Decay | None = None  # per update of the generator; None: no average is kept


@dataclass(frozen=True)
class IsgConfig:
    """ISG: weight (0 switches it off), the teacher's guidance, the mid-point's margin."""

    weight: Weight  # of L_ISG in the generator's loss; 0: off
    guidance: GuidanceRange  # the teacher's on its way to the mid-point, drawn per sample
    margin: Time  # least distance of the mid-point from its anchors, thousandths of their clock
    loss: IsgLoss = "charbonnier"  # l2: the paper's mean square


@dataclass(frozen=True)
class AdversarialConfig:
    """The adversary. vfm: heads on DINOv2 and CLIP (SenseFlow). bottleneck: a classifier on the
    fake score's UNet (DMD2). none, or weight 0: no adversary is built."""

    kind: Literal["vfm", "bottleneck", "none"]  # none: no adversary
    weight: Weight  # of L_adv in the generator's loss; 0: none is built
    discriminator_weight: Positive = 1.0  # of L_D in the discriminator's own
    omega_power: Power = 2.0  # vfm: omega is alpha to this power at the student's anchor
    least_omega: Share = 0.0  # vfm: it plays at anchors whose omega is above this
    reference: Literal["paired", "shuffled", "none"] = "paired"  # vfm: real image compared with
    taps: Taps = (2, 5, 8, 10, 14, 19, 23)  # vfm: DINOv2's blocks; and its embedding
    head_width: SmallCount | None = None  # vfm: channels of a head's maps; None: DINOv2's width
    virtual_batch: SmallCount = 1  # vfm: samples that share the statistics of a head's norm
    # Linear for files that do not name it: so are the heads of their runs. Recipes say equalized.
    text_layer: TextLayer = "linear"  # vfm: of a head; equalized: the release's
    spectral_norm: NormSchedule = "converged"  # vfm: its power iterations; release: the release's
    augment: bool = True  # vfm: DiffAugment on real and fake images
    time_range: TimeRange = (0.0, 999.0)  # bottleneck: of the noise on the latents it sees
    downsamplings: Halvings = 3  # bottleneck: of the head, before its convolution over 4 x 4
    norm_groups: SmallCount = 32  # bottleneck: of the head's group norms

    @property
    def in_use(self) -> str:
        """The kind that is built: "none" at weight 0."""
        return self.kind if self.weight > 0 else "none"


@dataclass(frozen=True)
class BackwardSimulationConfig:
    """The share of iterations whose clean latent is the student's own sample."""

    probability: Share  # 0: always from data; 1: never


@dataclass(frozen=True)
class RewardConfig:
    """Rewards on the student's own sampling (docs/rewards.md). With both weights 0 there are
    none."""

    weight: Weight = 0.0  # of L_GRPO in the generator's loss; 0: no rollouts
    last_weight: Weight = 0.0  # of the rewards' own gradient through x; 0: none
    anchors: Times | None = None  # of anchors.times: where x has that gradient; null: the last
    models: tuple[str, ...] = ()  # scorers, as evaluate score names them, or module:function
    files: tuple[str, ...] = ()  # of the scorers: evaluate score's flags, as pick_score=FOLDER
    weights: tuple[Weight, ...] = ()  # of each; empty: 1 each. One of 0 is measured alone
    group_size: GroupSize = 8  # samples of one prompt; divides train.batch_size
    transitions: Few = 1  # steps of a rollout that train, all with noise; others are drawn alone
    shared_noise: bool = False  # a group has one noise where no step trains
    eta: Annotated[float, Bounds(0, 1, above=True)] = 1.0  # of the sampler; 1: x0
    clip: Annotated[float, Bounds(0, 1, above=True, below=True)] = 1e-4  # of the ratio, from 1
    updates_per_rollout: Few = 1  # of the generator; with 1 every ratio is 1, and no clip acts

    @property
    def in_use(self) -> bool:
        """Whether anything is scored."""
        return self.weight > 0 or self.last_weight > 0

    @property
    def simulated_eta(self) -> float:
        """Of the sampler that the student's own states come from; 1 is the x0 sampler."""
        return self.eta if self.weight > 0 else 1.0

    @property
    def shares(self) -> tuple[float, ...]:
        """The weight of each model."""
        return self.weights or (1.0,) * len(self.models)

    def __post_init__(self) -> None:
        key = "reward.weight" if self.weight > 0 else "reward.last_weight"
        require(
            not self.in_use or len(self.models) > 0,
            f"{key} is above 0 and reward.models is empty: name a reward, such as [pick_score] or "
            "[my_module:my_function]",
        )
        require(
            len(set(self.models)) == len(self.models),
            f"reward.models {list(self.models)} names a reward twice",
        )
        require(
            len(self.weights) in (0, len(self.models)),
            f"reward.weights has {len(self.weights)} numbers for {len(self.models)} of "
            "reward.models: say one for each, or none",
        )
        require(
            not self.in_use or sum(self.shares) > 0,
            f"{key} is above 0 and all reward.weights are 0: nothing would be trained for",
        )


Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class PrecisionConfig:
    """The types networks compute in, and the one in which the weights that learn are kept."""

    compute: Dtype = "bfloat16"  # student, fake score, teacher, text encoders, DINOv2
    heads: Dtype = "float32"  # the discriminator's heads
    vae: Dtype = "float32"  # encoder and decoder
    masters: Dtype = "float32"  # of student and fake score; bfloat16 rounds stochastically
    head_masters: Dtype = "float32"  # of the heads; bfloat16 rounds stochastically
    matmul: Literal["high", "highest"] = "high"  # float32 on a GPU; high: TF32, 10 bits of products


@dataclass(frozen=True)
class ParallelConfig:
    """Sharding (FSDP2), recomputation and compilation."""

    replicas: SmallCount = 1  # HSDP: groups that each hold the whole network in shards
    activation_checkpointing: Block = 0  # 0: none; 1: every block is recomputed; k: every k-th
    recomputation: Literal["full", "selective"] = "full"  # selective: keeps matrix products
    compile: Literal["auto", True, False] = "auto"  # blocks and rounding; auto: where GPUs are
    reshard_after_forward: bool = True  # false: networks stay gathered until their weights change
    offload: Offload = "none"  # in host memory. trained: student and fake score; heads: the heads

    @property
    def compiled(self) -> bool:
        """Whether torch.compile is used, once the machine has settled what auto is."""
        return self.compile is True


@dataclass(frozen=True)
class DataConfig:
    """Reading images (or latents) and prompts."""

    max_sequence_length: SmallCount | None = None  # tokens of a prompt, in training and sampling
    separate_real: bool = False  # draw the discriminator's real samples apart from the prompts
    latents_scaled: bool | None = None  # of an LMDB that does not say; None: as DMD2's, yes
    num_workers: Workers = 4  # processes that read; 0: the training process itself
    crop: Literal["center", "random"] = "center"  # of images that have another shape
    max_unreadable: CountOrNone = 100  # unreadable files met before the run stops


@dataclass(frozen=True)
class LogConfig:
    """What the run folder shows besides stats.jsonl."""

    tensorboard: bool = True  # event files in tensorboard/
    sample_interval: CountOrNone = 500  # iterations between image strips; 0: none
    num_pictures: Annotated[int, Bounds(1, 64)] = 4  # samples in a strip
