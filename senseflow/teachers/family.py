"""A family of teachers: its facts, what it asks of a folder, and the doors to its networks.

Light on purpose: command lines read it before torch and diffusers are imported. What needs them is
imported where it is called. A family is a folder beside this file, with a `family` module that
holds a subclass of `Family` and an `adapter` module with the networks; a recipe of
`senseflow.config.recipes` makes it known.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from senseflow.common.files import read_json
from senseflow.core.levels import SIGMAS, Levels
from senseflow.teachers import folder
from senseflow.teachers.chat import Chat, require_chat
from senseflow.teachers.fields import Fields
from senseflow.teachers.folder import TeacherSettings
from senseflow.teachers.original import OriginalNames
from senseflow.teachers.published import Published
from senseflow.weights.quantized import require_plain

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline, SchedulerMixin
    from PIL import Image
    from torch import nn

    from senseflow.core.anchors import Anchors
    from senseflow.core.path import Path as NoisePath
    from senseflow.teachers.adapter import Adapter, Networks
    from senseflow.teachers.encoded import KnownPrompts
    from senseflow.weights.meta import Build, NetworkSource


DataKind = Literal["images", "latents"]
"""What paths.dataset is: a JSON of images, or an LMDB of latents."""


@dataclass(frozen=True)
class Plan:
    """How every image of one call is sampled."""

    steps: int
    sampler: str  # "x0", "euler" or "cps"
    levels: list[float] | None  # sigmas or timesteps; None: the scheduler's own (teacher)
    guidance: float | None  # None: the network takes none
    max_sequence_length: int | None  # tokens of a prompt; None: a fixed number
    height: int
    width: int
    eta: float | None = None  # of cps


@dataclass(frozen=True)
class Sides:
    """Which heights and widths, in pixels, a base can draw."""

    multiple: int
    default: int  # of students that do not say
    largest: int | None = None


@dataclass(frozen=True)
class StockSampling:
    """How a plain diffusers pipeline samples a student at its anchors."""

    scheduler: str  # class in diffusers
    changes: dict[str, Any]  # to the base's scheduler; with its `schedule` they are all there is
    levels: dict[str, Any]  # of the pipeline's call: num_inference_steps, or sigmas or timesteps
    guidance: float  # of the call, for a student that takes none


# Fields of text encoders' configs, each with its part: a field of the network's is their sum.
Widths = tuple[tuple[str, str], ...]


@dataclass(frozen=True, eq=False)
class Family(ABC):
    """One architecture of teachers, in training and in sampling."""

    name: str  # on its students' cards
    title: str
    script: str  # that samples its students, from the repository's root
    pipeline_class: str  # in diffusers
    network_class: str
    component: str  # the trained part's folder in a pipeline
    key_mark: str  # how some key of its networks begins, and no key of another family's
    blocks: tuple[str, ...]  # classes that --compile compiles
    base_flag: str
    config_flag: str
    teacher_steps: int
    teacher_guidance: float  # the pipeline's own number, as dmd.guidance and isg.guidance are
    published: Published
    original: OriginalNames | None = None  # of its networks in its authors' own files
    levels: Levels = SIGMAS
    embeds_guidance: bool = False  # guidance is an input of the network, not a second forward
    no_guidance: float = 1.0  # the pipeline's number that leaves out its unconditional half
    unguided: float = 1.0  # the number above which the pipeline guides
    guidance_key: str = "guidance_scale"  # of the pipeline's call
    seeds_every_step: bool = False  # the pipeline hands `generator=` on to its scheduler
    tokenizer: str | None = None  # whose tokens data.max_sequence_length counts; None: all fixed
    chat: Chat | None = None  # how its `tokenizer` is given prompts; None: as they are
    longest_prompt: int = 512  # of its tokens by default, where the folder states more, or nothing
    longest_allowed: int = 512  # of its tokens, by the pipeline's call
    null_prompt: str | None = None  # whose encoding is that of no prompt; None: none is encoded
    optional: tuple[str, ...] = ()  # parts that a folder may leave out, all or none of them
    packing: int = 1  # channels of the network's input for each of the VAE's latents
    output_packing: int | None = None  # of its output, as its config counts it; None: as many
    widths: Mapping[str, Widths] = field(default_factory=dict)  # of the network's inputs of text
    fields: Mapping[str, Fields] = field(default_factory=dict)  # of the parts, by their names
    last_config: Path | None = None  # for a base without a config of its network
    data: DataKind = "images"  # what its recipes' YAMLs are made for

    # ------------------------------------------------------------- a teacher's folder, read as JSON

    @abstractmethod
    def unit(self, base: Path) -> int:
        """Pixels of the side of one of the network's patches of latents."""

    @abstractmethod
    def sides(self, base: Path, config: dict[str, Any] | None) -> Sides:
        """What can be drawn with a base's VAE and a student's config (None: the base's own)."""

    def model_of(self, base: Path) -> str | None:
        """The title of the model in a folder of this pipeline; None: that cannot be told."""
        return self.title

    def is_this_size(self, base: Path) -> bool:
        """False for another family's of the same pipeline; a base that does not say may be both."""
        return self.model_of(base) in (None, self.title)

    def t5_length(self, base: Path) -> int:
        """The tokens of a prompt that a base allows, for students that do not say."""
        assert self.tokenizer, "only of families that let their length be chosen"
        most = min(self.longest_prompt, self.most_tokens(base))
        return folder.stated_length(base / self.tokenizer, most)

    def most_tokens(self, base: Path) -> int:
        """The tokens of a prompt beyond which no length can be chosen."""
        return self.longest_allowed

    def require(self, settings: TeacherSettings) -> None:
        """Raise ValueError unless the settings of a run fit a folder of this family."""
        folder.require_pipeline(settings.folder, self.pipeline_class)
        folder.require_components(settings.folder, self.optional)
        self.require_configs(settings.folder)
        if self.chat:
            require_chat(settings.folder / str(self.tokenizer), self.chat.template)
        unit, largest = self.unit(settings.folder), self.sides(settings.folder, None).largest
        size = f"train.resolution {list(settings.resolution)}"
        if any(side % unit for side in settings.resolution):
            raise ValueError(f"{size}: both sides must be multiples of {unit}")
        if largest and max(settings.resolution) > largest:
            raise ValueError(f"{size}: the network's table of positions ends at {largest} pixels")
        self.require_length(settings.folder, settings.max_sequence_length)
        self.require_student(settings)

    def require_configs(self, base: Path) -> None:
        """Raise ValueError for a folder whose parts compute what no recipe of this family does."""
        for name in read_json(base / folder.INDEX):
            require_plain(str(base / name / "config.json"), folder.base_config(base, name))
        for part, fields in self.fields.items():
            fields.require(base / part)
        self.require_widths(base)
        file, network = (
            base / self.component / "config.json",
            folder.base_config(base, self.component),
        )
        latents = folder.latent_channels(base)
        output = self.output_packing or self.packing
        for name, packing in (("in_channels", self.packing), ("out_channels", output)):
            channels = network.get(name)
            if channels not in (None, packing * latents):
                raise ValueError(
                    f"{file}: {name} is {channels}, and the VAE's latents have {latents} channels: "
                    f"a network of more than an image's latents is not {self.title}"
                )

    def cautions(self, base: Path) -> list[str]:
        """What is to be said of a folder that can be distilled, and hardly should be."""
        return []

    def require_widths(self, base: Path) -> None:
        """Raise ValueError for text encoders whose states the network of a base cannot take."""
        network = folder.base_config(base, self.component)
        for name, parts in self.widths.items():
            held = {part: folder.base_config(base, part).get(key) for part, key in parts}
            numbers = [value for value in held.values() if isinstance(value, int)]
            wanted = network.get(name)
            stated = isinstance(wanted, int) and len(numbers) == len(held)
            if stated and sum(numbers) != wanted:
                said = " + ".join(f"{part} {value}" for part, value in held.items())
                raise ValueError(
                    f"{base / self.component / 'config.json'}: {name} is {wanted}, and the text "
                    f"encoders beside it give {sum(numbers)} ({said}): they are of another teacher"
                )

    def schedule(self, base: Path) -> dict[str, Any]:
        """The fields of a base's scheduler that any other one needs to take the same levels."""
        return {}

    def require_scheduler(self, base: Path) -> None:
        """Raise ValueError for a base whose scheduler does not tell how a student's steps go."""
        if "scheduler" in self.fields:
            self.fields["scheduler"].require_class(base / "scheduler")

    def require_length(self, base: Path, length: int | None) -> None:
        """Raise ValueError for tokens of a prompt that a teacher does not know, or without any."""
        key = "data.max_sequence_length"
        if self.tokenizer is None:
            if length is not None:
                raise ValueError(f"{key}: {self.title} has no T5; leave it out")
            return
        if length is None:
            raise ValueError(f"{key} is missing: the tokens of a prompt that this teacher reads")
        if read_json(base / folder.INDEX).get(self.tokenizer, [None])[0] is None:
            return  # zeros of any length stand for what it would have said
        config = read_json(base / self.tokenizer / "tokenizer_config.json")
        if (stated := config.get("model_max_length")) and length > stated:
            raise ValueError(f"{key} {length}: the teacher's tokenizer was made for {stated}")
        if length > (most := self.most_tokens(base)):
            raise ValueError(
                f"{key} {length}: {self.title} takes {most} tokens of a prompt at most"
            )

    def require_guidance(self, name: str, scale: float) -> None:
        """Raise ValueError for a scale of classifier-free guidance below that of the prompt alone.

        There the pipeline draws as without guidance, and the formula on towards no prompt.
        """
        if not self.embeds_guidance and scale < self.unguided:
            raise ValueError(
                f"{name} {scale:g}: the pipeline of {self.title} guides above {self.unguided:g}; "
                f"{self.unguided:g} is without"
            )

    def require_student(self, settings: TeacherSettings) -> None:
        """Raise ValueError for keys that only a FLUX student has."""
        if settings.linked or (settings.fold_guidance, settings.guidance) != (None, None):
            raise ValueError(
                "paths.flux_wo_guidance_embed, student.fold_guidance and student.guidance are for "
                "FLUX alone; say null"
            )

    def guided(self, guidance: float, num: int) -> dict[str, Any]:
        """The arguments of the pipeline's call by which it guides a batch of `num` prompts."""
        return {self.guidance_key: guidance}

    def null_prompt_of(self, base: Path) -> str | None:
        """The null prompt of a folder, where that may differ within the family."""
        return self.null_prompt

    def latent_shape(self, settings: TeacherSettings) -> tuple[int, int, int]:
        """(C, h, w) of one sample, as the network sees it, at the run's resolution."""
        return self.posterior_shape(settings)

    def posterior_shape(self, settings: TeacherSettings) -> tuple[int, int, int]:
        """(C, h, w) of what the VAE says of one image, before it is normalised."""
        factor = folder.vae_factor(settings.folder)
        height, width = (side // factor for side in settings.resolution)
        return folder.latent_channels(settings.folder), height, width

    def bottleneck(self, settings: TeacherSettings) -> tuple[int, int, int] | None:
        """(C, h, w) of the mid-block's output at the run's resolution; None: it has none."""
        return None

    # ----------------------------------------------------------------------- times and noise levels

    @abstractmethod
    def path(self, settings: TeacherSettings) -> "NoisePath":
        """The noise path, of the folder's scheduler, with the clock that all times are read on."""

    @abstractmethod
    def anchors(self, settings: TeacherSettings, times: tuple[float, ...]) -> "Anchors":
        """The student's anchors, of times before any shift, which may depend on their number."""

    @abstractmethod
    def sampled_at(self, path: "NoisePath", anchors: "Anchors") -> tuple[float, ...]:
        """The anchors as `levels` counts them: what a student's card says."""

    @abstractmethod
    def default_anchors(self, base: Path, num: int) -> list[float]:
        """The levels of `num` steps of a base, for students without a card."""

    @abstractmethod
    def stock_sampling(self, anchors: tuple[float, ...]) -> StockSampling:
        """How a plain pipeline draws at a card's anchors."""

    def rounded(self, anchors: tuple[float, ...], levels: list[float]) -> list[float]:
        """The levels of a student with a card's anchors, as stock_sampling's scheduler rounds."""
        return levels

    def comfyui(self, anchors: tuple[float, ...], guidance: float | None) -> str | None:
        """The sentence on the node by which ComfyUI draws at a card's anchors; None: by none.

        guidance: what a student that takes one is fed.
        """
        return None

    # -------------------------------------------------------------------------- a student's config

    def takes_guidance(self, config: dict[str, Any]) -> bool:
        """Whether a student with this config is fed a guidance."""
        return False

    def fit_config(self, config: dict[str, Any], keys: list[str]) -> dict[str, Any]:
        """The teacher's config for a student's weights with these keys, diffusers' or original."""
        return config

    @property
    def key_marks(self) -> tuple[str, ...]:
        """How some key of its weights begins: in diffusers' names, and in its authors'."""
        original = self.original and self.original.mark
        return (self.key_mark, original) if original else (self.key_mark,)

    # -------------------------------------------------------------------------------- LoRA files

    def kohya_names(self, base: Path) -> Callable[[str], str] | None:
        """A layer's name in LoRA files of kohya's form, where that is what clients read; None:
        they read diffusers'."""
        return None

    # ------------------------------------------------------------------------ the networks: seconds

    @abstractmethod
    def networks(self) -> "Networks":
        """How all that follows is built: imports the family's `adapter` module."""

    def teacher(self, settings: TeacherSettings) -> "NetworkSource":
        """The frozen teacher of a folder, on the meta device; raises ValueError."""
        return self.networks().teacher(settings)

    def student(self, settings: TeacherSettings) -> "NetworkSource":
        """The start of student and fake score, on the meta device; raises ValueError."""
        return self.networks().student(settings)

    def text_encoders(self, settings: TeacherSettings) -> "dict[str, NetworkSource]":
        """The frozen text encoders of a folder, by component; raises ValueError."""
        from senseflow.teachers.text_encoders import text_encoders

        folder.require_vocabularies(settings.folder)
        kinds = self.networks().adapter.text_encoders
        return text_encoders(settings.folder, kinds, settings.compute_dtype)

    def vae(self, settings: TeacherSettings) -> "NetworkSource":
        """The frozen VAE of a folder, on the meta device; raises ValueError."""
        from senseflow.weights.meta import component

        kind = self.networks().adapter.vae_class
        return component(settings.folder / "vae", settings.vae_dtype, kind)

    def load_adapter(
        self,
        settings: TeacherSettings,
        device: "torch.device",
        build: "Build",
        known: "KnownPrompts | None" = None,
    ) -> "Adapter":
        """The frozen encoders; with `known` no text encoder is read, `encode_prompts` has none."""
        path, shape = self.path(settings), self.latent_shape(settings)
        null_prompt = self.null_prompt_of(settings.folder)
        return self.networks().adapter.load(
            settings, path, shape, device, build, known, null_prompt
        )

    def open_pipeline(
        self, base: Path, network: "Callable[[], nn.Module] | None", dtype: "torch.dtype"
    ) -> "DiffusionPipeline":
        """The base's pipeline in host memory; raises ValueError before any weight is read.

        network: reads what draws in the place of the base's own network, which then is not read.
        """
        return self.networks().adapter.read_pipeline(base, network, dtype, dtype)

    @abstractmethod
    def make_scheduler(self, own: "SchedulerMixin", plan: Plan) -> "SchedulerMixin":
        """The plan's sampler, made from the base's own scheduler."""

    @abstractmethod
    def sample(
        self,
        pipeline: "DiffusionPipeline",
        prompts: list[str],
        generators: list["torch.Generator"],
        plan: Plan,
    ) -> list["Image.Image"]:
        """One batch through the pipeline's own call; image i depends on generator i alone."""
