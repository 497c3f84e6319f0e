"""AdamW whose weights or moments are kept in fewer than 32 bits and rounded stochastically.

A group of elements at a time is brought to float32, moved by torch's own fused AdamW, and rounded
back: the arithmetic is that of float32, and an update of any size arrives in the mean. No library's
optimizer did all that is asked of one here under FSDP2 (docs/memory.md says which did what).
"""

from collections.abc import Iterable, Sequence
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from senseflow.core.eight_bit import BLOCK, decode, encode
from senseflow.core.rounding import noise_of, round_stochastically
from senseflow.engine.stretches import Stretch, flat_shard, groups, random_bits

States = Literal["float32", "bfloat16", "8bit"]
Shards = Sequence[dict[str, Tensor]]  # flat, by name, of each parameter: its weight, grad and state

MOMENTS = {"exp_avg": True, "exp_avg_sq": False}  # whether they are signed


class CompactAdamW(torch.optim.AdamW):
    """AdamW on float32 or bfloat16 parameters, its moments in float32, bfloat16 or 8 bits.

    8 bits are for parameters whose rows are whole blocks of 64; the others (biases, scales of
    norms) keep float32. States are sharded as their parameter. A step that finds infinities changes
    nothing: the kernel leaves what it is given, and rounding leaves what is representable.

    found_inf: 0-d float, 1 where the step is to change nothing; grad_scale: 0-d, by which gradients
    are divided. Both are read on the device alone. seed: of the rounding, set before every step.
    """

    def __init__(self, parameters: Iterable[Tensor], states: States, **settings: Any) -> None:
        super().__init__(parameters, fused=True, **settings)
        self.states = states
        self.found_inf: Tensor | None = None
        self.grad_scale: Tensor | None = None
        self.seed = 0

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # without a closure
        """Move the parameters that have a gradient."""
        assert closure is None
        for settings in self.param_groups:
            parameters = settings["params"]
            moved = [p.grad is not None for p in parameters]
            shards = [self._shards(p) if p.grad is not None else {} for p in parameters]
            kinds = [(p.dtype, self._in_8_bits(p)) for p in parameters]
            for kind in dict.fromkeys(kinds):
                chosen = [m and k == kind for m, k in zip(moved, kinds, strict=True)]
                for group in groups(parameters, chosen):
                    self._move(group, shards, kind[1], settings)
            steps = [of["step"] for of in shards if of]
            if steps:
                torch._foreach_add_(steps, 1)
            if steps and self.found_inf is not None:
                torch._foreach_sub_(steps, [self.found_inf.to(steps[0].device)] * len(steps))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which would bring the states to the type of the parameters."""
        super().load_state_dict({**state_dict, "state": {}})
        numbers = [n for settings in state_dict["param_groups"] for n in settings["params"]]
        parameters = [p for settings in self.param_groups for p in settings["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            if number in state_dict["state"]:
                state = state_dict["state"][number]
                self.state[parameter] = {k: v.to(parameter.device) for k, v in state.items()}

    def _in_8_bits(self, parameter: Tensor) -> bool:
        row = prod(parameter.shape[1:])
        return self.states == "8bit" and row % BLOCK == 0 and row > 0

    def _shards(self, parameter: Tensor) -> dict[str, Tensor]:
        if not self.state[parameter]:
            self.state[parameter] = self._first_state(parameter)
        tensors = {"weight": parameter, "grad": parameter.grad, **self.state[parameter]}
        return {name: flat_shard(tensor) for name, tensor in tensors.items()}

    def _first_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """The count of steps, and moments of zero."""
        weight = parameter.detach()
        state = {"step": torch.zeros((), device=weight.device)}
        for name in MOMENTS:
            if self._in_8_bits(parameter):
                blocks = weight.flatten(1)[:, : prod(weight.shape[1:]) // BLOCK]
                state[f"{name}_codes"] = torch.zeros_like(weight, dtype=torch.uint8)
                state[f"{name}_scales"] = torch.zeros_like(
                    blocks, dtype=torch.float32, memory_format=torch.contiguous_format
                )
            else:
                dtype = torch.bfloat16 if self.states == "bfloat16" else torch.float32
                state[name] = torch.zeros_like(weight, dtype=dtype)
        return state

    def _move(
        self, group: list[Stretch], shards: Shards, in_8_bits: bool, settings: dict[str, Any]
    ) -> None:
        """One step of a group of elements of one type."""
        flat = {name: torch.cat(_parts(group, shards, name)).float() for name in ("weight", "grad")}
        for name, signed in MOMENTS.items():
            if in_8_bits:
                codes = torch.cat(_parts(group, shards, f"{name}_codes"))
                scales = torch.cat(_parts(group, shards, f"{name}_scales", BLOCK))
                flat[name] = decode(codes, scales, signed)
            else:
                flat[name] = torch.cat(_parts(group, shards, name)).float()
        sizes = [len(stretch) for stretch in group]
        weights, gradients, first, second = (
            list(flat[name].split(sizes)) for name in ("weight", "grad", *MOMENTS)
        )
        adamw(
            weights,
            gradients,
            first,
            second,
            max_exp_avg_sqs=[],
            state_steps=[shards[s.index]["step"].view(()).clone() for s in group],
            fused=True,
            grad_scale=self.grad_scale,
            found_inf=self.found_inf,
            amsgrad=False,
            beta1=settings["betas"][0],
            beta2=settings["betas"][1],
            lr=settings["lr"],
            weight_decay=settings["weight_decay"],
            eps=settings["eps"],
            maximize=False,
        )
        bits = random_bits(group, self.seed, flat["weight"].device)
        _keep(group, shards, "weight", flat["weight"], noise_of(bits, 0))
        for part, name in enumerate(MOMENTS, start=1):
            if in_8_bits:
                self._keep_in_8_bits(group, shards, name, flat[name], noise_of(bits, part))
            else:
                _keep(group, shards, name, flat[name], noise_of(bits, part))

    def _keep_in_8_bits(
        self, group: list[Stretch], shards: Shards, name: str, values: Tensor, noise: Tensor
    ) -> None:
        codes, scales = encode(values, MOMENTS[name], noise)
        for kind, new, block in (("codes", codes, 1), ("scales", scales, BLOCK)):
            kept = _parts(group, shards, f"{name}_{kind}", block)
            if self.found_inf is not None:  # a code's own value may be rounded to its neighbour
                new = torch.where(self.found_inf.to(new.device) > 0, torch.cat(kept), new)
            torch._foreach_copy_(kept, list(new.split([part.numel() for part in kept])))


def _parts(group: list[Stretch], shards: Shards, name: str, block: int = 1) -> list[Tensor]:
    return [stretch.of(shards[stretch.index][name], block) for stretch in group]


def _keep(group: list[Stretch], shards: Shards, name: str, values: Tensor, noise: Tensor) -> None:
    """Write float32 values back to where they are kept, rounded if that is bfloat16."""
    kept = _parts(group, shards, name)
    if kept[0].dtype == torch.bfloat16:
        values = round_stochastically(values, noise)
    torch._foreach_copy_(kept, list(values.split([part.numel() for part in kept])))
