"""The few-step samplers: of flow students, and of SDXL's."""

from abc import abstractmethod
from functools import cached_property
from typing import Any, Self

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LCMScheduler, SchedulerMixin
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteSchedulerOutput,
)
from diffusers.schedulers.scheduling_lcm import LCMSchedulerOutput
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from senseflow.core.path import FlowPath, Path, VPPath
from senseflow.core.policy import transition

Generators = torch.Generator | list[torch.Generator] | None


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
        generator: Generators = None,
        return_dict: bool = True,
    ) -> FlowMatchEulerDiscreteSchedulerOutput | tuple[Tensor]:
        """One step from `sample` (B, ...) with v = `model_output`; noise is drawn in float32."""
        generator = one_per_row(sample, generator if generator is not None else self.generators)
        return super().step(
            model_output, timestep, sample, generator=generator, return_dict=return_dict
        )


def one_per_row(sample: Tensor, generators: Generators) -> Generators:
    """The generators as they are; raises ValueError for a list of another length than the batch."""
    if isinstance(generators, list) and len(generators) != len(sample):
        raise ValueError(f"{len(generators)} generators for a batch of {len(sample)}")
    return generators


class CpsSteps(SchedulerMixin):
    """What a scheduler of either path does at a step with eta: `senseflow.core.policy.transition`.

    eta 0 to 1: how much of the noise is fresh. generators: as FlowMatchEulerX0Scheduler has them;
    they give the same noise here, so that eta 1 is the x0 sampler, and eta 0 euler.
    """

    eta: float
    generators: list[torch.Generator] | None = None

    def with_eta(self, eta: float) -> Self:
        """Itself, at an eta."""
        self.eta = eta
        return self

    @property
    @abstractmethod
    def path(self) -> Path:
        """On which its steps are."""

    @abstractmethod
    def clock(self) -> Tensor:
        """The times (K + 1,) of the steps on the path's clock, from pure noise to none."""

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """One step from `sample` (B, ...) with the network's `model_output`, in float32; the result
        is in the sample's type."""
        generator = one_per_row(sample, generator if generator is not None else self.generators)
        if self.step_index is None:
            self._init_step_index(timestep)
        times = self.clock()[self._step_index :].to(sample.device)
        t, s = (time.expand(len(sample)) for time in times[:2])
        law = transition(self.path, self.path.read(model_output, sample, t), s, self.eta)
        noise = randn_tensor(
            sample.shape, generator=generator, device=sample.device, dtype=torch.float32
        )
        self._step_index += 1
        following = law.draw(noise).to(sample.dtype)
        return SchedulerOutput(prev_sample=following) if return_dict else (following,)


class FlowMatchCpsScheduler(CpsSteps, FlowMatchEulerDiscreteScheduler):
    """CPS on the straight path, at the stock scheduler's sigmas."""

    @property
    def path(self) -> FlowPath:
        """Whose clock is sigma, without a shift."""
        return FlowPath()

    def clock(self) -> Tensor:
        """1000 sigma."""
        sigmas: Tensor = self.sigmas
        return 1000 * sigmas


class VPCpsScheduler(CpsSteps, LCMScheduler):
    """CPS on SDXL's path, at LCMScheduler's timesteps."""

    @cached_property
    def path(self) -> VPPath:
        """Of the scheduler's own betas."""
        return VPPath(self.alphas_cumprod)

    def clock(self) -> Tensor:
        """The timesteps, and the path's reading at no noise."""
        times = self.timesteps.float()
        return torch.cat([times, times.new_tensor([self.path.clean])])


FLOW_SCHEDULERS = {
    "x0": FlowMatchEulerX0Scheduler,
    "euler": FlowMatchEulerDiscreteScheduler,
    "cps": FlowMatchCpsScheduler,
}


def flow_scheduler(
    own: SchedulerMixin, sampler: str, exact: bool, eta: float | None = None
) -> SchedulerMixin:
    """The `x0`, `euler` or `cps` scheduler of a base, whose own scheduler is given.

    exact: one that takes sigmas as they are given, without any shift or spacing of the base's. A
    base's own of another class is left as it is. eta: of cps.
    """
    kind = FLOW_SCHEDULERS[sampler]
    if not exact and not isinstance(own, FlowMatchEulerDiscreteScheduler):
        return own
    scheduler = kind() if exact else kind.from_config(own.config, stochastic_sampling=False)
    return scheduler if eta is None else scheduler.with_eta(eta)


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
        generator: Generators = None,
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
