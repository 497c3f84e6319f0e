"""The few-step samplers: of flow students, and of SDXL's."""

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LCMScheduler, SchedulerMixin
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteSchedulerOutput,
)
from diffusers.schedulers.scheduling_lcm import LCMSchedulerOutput
from torch import Tensor


class FlowMatchEulerX0Scheduler(FlowMatchEulerDiscreteScheduler):
    """x_0 = x_t - sigma v, then x_next = (1 - sigma_next) x_0 + sigma_next fresh noise.

    The stock scheduler with `stochastic_sampling` always on, step for step. FluxPipeline and
    StableDiffusion3Pipeline hand their generators to the initial noise but not to `step`: put
    them, one per row of the batch, in `generators` before the call, and an image depends on its
    own seed alone, not on its batch.
    """

    generators: list[torch.Generator] | None = None

    def register_to_config(self, **values: object) -> None:
        """Any config makes an x0 sampler; `from_config(pipeline.scheduler.config)` does too."""
        super().register_to_config(**{**values, "stochastic_sampling": True})

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> FlowMatchEulerDiscreteSchedulerOutput | tuple[Tensor]:
        """One step from `sample` (B, ...) with v = `model_output`; noise is drawn in float32."""
        generator = generator if generator is not None else self.generators
        if isinstance(generator, list) and len(generator) != len(sample):
            raise ValueError(f"{len(generator)} generators for a batch of {len(sample)}")
        return super().step(
            model_output, timestep, sample, generator=generator, return_dict=return_dict
        )


def flow_scheduler(own: SchedulerMixin, sampler: str, exact: bool) -> SchedulerMixin:
    """The `x0` or `euler` scheduler of a base, whose own scheduler is given.

    exact: one that takes sigmas as they are given, without any shift or spacing of the base's. A
    base's own of another class is left as it is.
    """
    kind = FlowMatchEulerX0Scheduler if sampler == "x0" else FlowMatchEulerDiscreteScheduler
    if exact:
        return kind()
    if not isinstance(own, FlowMatchEulerDiscreteScheduler):
        return own
    return kind.from_config(own.config, stochastic_sampling=False)


def own_sigmas(config: dict[str, Any], num: int = 4) -> list[float]:
    """The sigmas of `num` steps under a flow scheduler's own shift, noisy to clean.

    With dynamic shifting the shift is the largest, that of the size the teacher was trained at:
    FLUX.1-dev gives 1, .9045, .7595, .5128, FluxPipeline's own four steps at 1024 x 1024.
    """
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    times = [1 - step / num for step in range(num)]
    scheduler.set_timesteps(sigmas=times, mu=config.get("max_shift", 1.15))
    return [float(sigma) for sigma in scheduler.sigmas[:-1]]


def stock_sigmas(changes: dict[str, Any], steps: int | list[float]) -> list[float]:
    """What the stock scheduler makes of a number of steps, or of sigmas; noisy to clean."""
    scheduler = FlowMatchEulerDiscreteScheduler(**changes)
    if isinstance(steps, int):
        scheduler.set_timesteps(steps)
    else:
        scheduler.set_timesteps(sigmas=steps)
    made: list[float] = scheduler.sigmas[:-1].tolist()
    return made


def as_made(levels: list[float], made: list[float]) -> list[float]:
    """The levels, in place of those that float32 does not round to what a scheduler made of them,
    what it made."""
    rounded = torch.tensor(levels).tolist()
    return [
        level if here == there else there
        for level, here, there in zip(levels, rounded, made, strict=True)
    ]


class Float32LCMScheduler(LCMScheduler):
    """LCMScheduler whose steps, and their noise, are float32 whatever the network's type.

    At SDXL's first anchor x_0 = (x_t - sigma eps) / alpha divides by .07: done in bfloat16, the
    step alone doubles the error that the network's rounded output brings.
    """

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> LCMSchedulerOutput | tuple[Tensor, Tensor]:
        """One step from `sample` (B, ...) with eps = `model_output`; the results in its type."""
        stepped = super().step(
            model_output.float(), timestep, sample.float(), generator=generator, return_dict=False
        )
        following, denoised = (value.to(sample.dtype) for value in stepped)
        if not return_dict:
            return following, denoised
        return LCMSchedulerOutput(prev_sample=following, denoised=denoised)
