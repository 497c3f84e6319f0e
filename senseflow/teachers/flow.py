"""What FLUX and SD3.5 have in common on the command line: sigmas as they are, and their call."""

from typing import TYPE_CHECKING, Any

from senseflow.teachers.family import Plan, StockSampling

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
    from PIL import Image

NO_GUIDANCE = 1.0  # SD3.5's pipeline then leaves out the unconditional half


def make_scheduler(
    own: "FlowMatchEulerDiscreteScheduler", plan: Plan
) -> "FlowMatchEulerDiscreteScheduler":
    """See `senseflow.teachers.schedulers.flow_scheduler`."""
    from senseflow.teachers.schedulers import flow_scheduler

    return flow_scheduler(own, plan)


def sample(
    pipeline: "DiffusionPipeline",
    prompts: list[str],
    generators: list["torch.Generator"],
    plan: Plan,
) -> list["Image.Image"]:
    """One batch through the pipeline's own call; guided where the plan has a scale."""
    pipeline.scheduler.generators = generators  # the pipeline does not hand them on
    images: list[Image.Image] = pipeline(
        prompts,
        height=plan.height,
        width=plan.width,
        num_inference_steps=plan.steps,
        sigmas=plan.levels,
        guidance_scale=NO_GUIDANCE if plan.guidance is None else plan.guidance,
        max_sequence_length=plan.max_sequence_length,
        generator=generators,
    ).images
    return images


def stock_flow(
    levels: dict[str, Any], shift: float = 1.0, shift_terminal: float | None = None
) -> StockSampling:
    """The stock scheduler with fresh noise at every step and one shift at every size."""
    changes = {
        "shift": shift,
        "shift_terminal": shift_terminal,
        "use_dynamic_shifting": False,
        "stochastic_sampling": True,
    }
    return StockSampling("FlowMatchEulerDiscreteScheduler", changes, levels, NO_GUIDANCE)
