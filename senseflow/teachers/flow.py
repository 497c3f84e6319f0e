"""What families of flow teachers have in common: sigmas as they are, and the pipelines' call."""

from abc import abstractmethod
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Any

from senseflow.common.fields import short
from senseflow.core.levels import even_times, one_shift, shifted
from senseflow.teachers.family import Family, Plan, StockSampling
from senseflow.teachers.folder import TeacherSettings, scheduler_config

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
    from PIL import Image

    from senseflow.core.anchors import Anchors
    from senseflow.core.path import FlowPath
    from senseflow.core.path import Path as NoisePath

SIDE = 1024  # pixels, of students whose config does not say
SHIFTS = dict(  # the fields of a flow scheduler that shift its sigmas, and diffusers' defaults
    shift=1.0,
    use_dynamic_shifting=False,
    base_shift=0.5,
    max_shift=1.15,
    base_image_seq_len=256,
    max_image_seq_len=4096,
    time_shift_type="exponential",
)


def aura_flow(shift: float) -> str:
    """ComfyUI's node for a network that is told sigma from 1 to 0, at this shift."""
    return (
        f"Between loader and sampler the node ModelSamplingAuraFlow with shift {shift:.4g}. "
        "Not ModelSamplingSD3: it feeds the network 1000 sigma in place of sigma."
    )


def flow_config(folder: "Path") -> dict[str, Any]:
    """The config of a folder's flow scheduler, with diffusers' defaults for what it leaves out.

    Raises ValueError for a constant shift that is no number above 0, and a dynamic one's ends that
    are no numbers.
    """
    config = scheduler_config(folder, **SHIFTS)
    dynamic = config["use_dynamic_shifting"]
    for name in ("base_shift", "max_shift") if dynamic else ("shift",):
        value, least = config[name], -inf if dynamic else 0
        if not isinstance(value, int | float) or not least < value < inf:
            raise ValueError(
                f"{folder / 'scheduler' / 'scheduler_config.json'}: {name} is {short(value)}, and "
                f"must be a number{'' if dynamic else ' above 0'}"
            )
    return config


@dataclass(frozen=True, eq=False)
class FlowFamily(Family):
    """A family whose network predicts v = eps - x_0 and whose levels are sigmas."""

    def path(self, settings: TeacherSettings) -> "FlowPath":
        """The straight path, with the shift from the clock to sigma; here the clock is sigma."""
        from senseflow.core.path import FlowPath

        return FlowPath()

    @abstractmethod
    def shift(self, settings: TeacherSettings, num: int) -> float:
        """The shift of sigma that the folder's scheduler gives `num` steps at this size."""

    def anchors(self, settings: TeacherSettings, times: tuple[float, ...]) -> "Anchors":
        """The times through the scheduler's own shift, unless another one is given.

        What of it the path's clock has in it already is not put on again: shifts multiply.
        """
        from senseflow.core.anchors import Anchors, shift_time

        path = self.path(settings)
        shift = (settings.shift or self.shift(settings, len(times))) / path.shift
        return Anchors(tuple(shift_time(t, shift) for t in times), end=path.clean)

    def sampled_at(self, path: "NoisePath", anchors: "Anchors") -> tuple[float, ...]:
        """The noise levels of the anchors, in (0, 1]."""
        import torch

        _, sigma = path.alpha_sigma(torch.tensor(anchors.times))
        return tuple(sigma.tolist())

    def make_scheduler(
        self, own: "FlowMatchEulerDiscreteScheduler", plan: Plan
    ) -> "FlowMatchEulerDiscreteScheduler":
        """A student's takes the plan's sigmas as they are; a teacher's is the base's own."""
        from senseflow.teachers.schedulers import flow_scheduler

        return flow_scheduler(own, plan.sampler, plan.levels is not None, plan.eta)

    def sample(
        self,
        pipeline: "DiffusionPipeline",
        prompts: list[str],
        generators: list["torch.Generator"],
        plan: Plan,
    ) -> list["Image.Image"]:
        """One batch through the pipeline's own call; guided where the plan has a scale."""
        pipeline.scheduler.generators = generators  # the pipeline does not hand them on
        # Without a scale no unconditional half: a student has its guidance in its weights.
        guidance = self.no_guidance if plan.guidance is None else plan.guidance
        images: list[Image.Image] = pipeline(
            prompt=[*prompts],  # ZImagePipeline writes into the list that it is given
            height=plan.height,
            width=plan.width,
            num_inference_steps=plan.steps,
            sigmas=plan.levels,
            max_sequence_length=plan.max_sequence_length,
            generator=generators,
            **self.guided(guidance, len(prompts)),
        ).images
        return images

    def stock_flow(
        self, levels: dict[str, Any], shift: float = 1.0, shift_terminal: float | None = None
    ) -> StockSampling:
        """The stock scheduler with fresh noise at every step and one shift at every size."""
        changes = {
            "shift": shift,
            "shift_terminal": shift_terminal,
            "use_dynamic_shifting": False,
            "stochastic_sampling": True,
        }
        return StockSampling("FlowMatchEulerDiscreteScheduler", changes, levels, self.no_guidance)


@dataclass(frozen=True, eq=False)
class OneShiftFamily(FlowFamily):
    """One whose scheduler has one shift, at every size and for every number of steps.

    Its clock is the index before that shift: times are drawn evenly where the teacher's own are.
    """

    def path(self, settings: TeacherSettings) -> "FlowPath":
        """The flow path with the shift of the folder's scheduler."""
        from senseflow.core.path import FlowPath

        return FlowPath(shift=self.shift(settings, 0))

    def shift(self, settings: TeacherSettings, num: int) -> float:
        """The scheduler's own."""
        return float(flow_config(settings.folder)["shift"])


@dataclass(frozen=True, eq=False)
class EvenFlowFamily(FlowFamily):
    """One whose pipeline spaces its sigmas evenly from 1 to 1/K, at any size; its scheduler shifts
    them."""

    def stock_sampling(self, anchors: tuple[float, ...]) -> StockSampling:
        """By the number of steps alone where one shift gives the anchors, else by sigmas."""
        shift = one_shift(anchors)
        if shift is None:
            return self.stock_flow({"sigmas": list(anchors)})
        return self.stock_flow({"num_inference_steps": len(anchors)}, shift)

    def rounded(self, anchors: tuple[float, ...], levels: list[float]) -> list[float]:
        """Sigmas as that scheduler's float32 shift makes them."""
        shift = one_shift(anchors)
        if shift is None:
            return levels
        from senseflow.teachers.schedulers import as_made, stock_sigmas

        # An anchor's time is known: from its sigma, a float32, it would be off in the last bit.
        known = dict(zip(anchors, even_times(len(anchors)), strict=True))
        times = [known.get(sigma, shifted(sigma, 1 / shift)) for sigma in levels]
        return as_made(levels, stock_sigmas({"shift": shift}, times))
