"""The few-step samplers of flow students."""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.configuration_utils import FrozenDict
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteSchedulerOutput,
)
from torch import Tensor


class FlowMatchEulerX0Scheduler(FlowMatchEulerDiscreteScheduler):
    """x_0 = x_t - sigma v, then x_next = (1 - sigma_next) x_0 + sigma_next fresh noise.

    The stock scheduler with `stochastic_sampling` always on, step for step. FluxPipeline hands its
    generators to the initial noise but not to `step`: put them, one per row of the batch, in
    `generators` before the call, and an image depends on its own seed alone, not on its batch.
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


def exact_scheduler(config: FrozenDict, sampler: str) -> FlowMatchEulerDiscreteScheduler:
    """The `x0` or `euler` scheduler that takes sigmas as they are given, without another shift."""
    changes = {"shift": 1.0, "use_dynamic_shifting": False, "shift_terminal": None}
    if sampler == "x0":
        return FlowMatchEulerX0Scheduler.from_config(config, **changes)
    return FlowMatchEulerDiscreteScheduler.from_config(config, **changes, stochastic_sampling=False)


def default_anchors(config: FrozenDict, num: int = 4) -> list[float]:
    """The sigmas of `num` steps under a scheduler's own shift, noisy to clean.

    With dynamic shifting the shift is the largest, that of the size the teacher was trained at:
    FLUX.1-dev gives 1, .9045, .7595, .5128, FluxPipeline's own four steps at 1024 x 1024.
    """
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    times = [1 - step / num for step in range(num)]
    scheduler.set_timesteps(sigmas=times, mu=config.get("max_shift", 1.15))
    return scheduler.sigmas[:-1].tolist()


def sigmas_of(anchors: list[float], steps: int, two_steps: str = "spread") -> list[float]:
    """The sigmas of `steps` steps for a student trained at K anchors: 1, 2, K or 2K.

    1: the first anchor. 2: the first and the middle one ("spread"), or the first two ("first").
    2K: the anchors, and between them the points twice as dense through the anchors' own shift
    sigma = s u / (1 + (s - 1) u) of equally spaced u. Raises ValueError for other numbers.
    """
    num = len(anchors)
    possible = sorted({1, 2, num, 2 * num})
    if steps == num:
        return list(anchors)
    if steps == 1:
        return anchors[:1]
    if steps == 2 and num > 2:
        return anchors[:2] if two_steps == "first" else [anchors[0], anchors[num // 2]]
    if steps == 2 * num:
        return _twice_as_dense(anchors)
    raise ValueError(f"{steps}: a student of {num} anchors samples in {possible} steps")


def _twice_as_dense(anchors: list[float]) -> list[float]:
    num = len(anchors)
    times = [1 - step / num for step in range(num)]
    below_one = list(zip(anchors, times, strict=True))[1:]
    shifts = [sigma * (1 - u) / (u * (1 - sigma)) for sigma, u in below_one]
    if anchors[0] != 1 or not shifts or max(shifts) > 1.02 * min(shifts):
        raise ValueError(
            f"{2 * num}: the anchors {anchors} are not one shift of equally spaced times"
        )
    shift = sum(shifts) / len(shifts)
    between = [u - 0.5 / num for u in times]
    dense = [shift * u / (1 + (shift - 1) * u) for u in between]
    return [sigma for pair in zip(anchors, dense, strict=True) for sigma in pair]
