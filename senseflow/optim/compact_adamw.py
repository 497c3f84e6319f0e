"""AdamW whose weights or moments are kept in fewer than 32 bits and rounded stochastically.

A group of elements at a time is brought to float32, moved by torch's own fused AdamW, and rounded
back: the arithmetic is that of float32, and an update of any size arrives in the mean. No library's
optimizer did all that is asked of one here under FSDP2 (docs/memory.md says which did what).
"""

from collections.abc import Iterable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from senseflow.core.names import States
from senseflow.optim.eight_bit import BLOCK, code_numbers, decode, encode
from senseflow.optim.rounding import noise_of, random_words, round_stochastically, word_of
from senseflow.optim.stretches import Stretch, flat_shards, fused, groups, numbers_of

Shards = Sequence[dict[str, Tensor]]  # flat, by name, of each parameter: its weight, grad and state

MOMENTS = {"exp_avg": True, "exp_avg_sq": False}  # whether they are signed


class CompactAdamW(torch.optim.AdamW):
    """AdamW on float32 or bfloat16 parameters, its moments in float32, bfloat16 or 8 bits.

    8 bits are for parameters whose rows are whole blocks of 64; the others (biases, scales of
    norms) keep float32. States are sharded as their parameter. A step that finds infinities changes
    nothing: the kernel leaves what it is given, and rounding leaves what is representable.

    compiled: all but AdamW itself by torch.compile, in a few passes over each element.
    found_inf: 0-d float, 1 where the step is to change nothing; grad_scale: 0-d, by which gradients
    are divided. Both are read on the device alone. seed: of the rounding, set before every step.
    """

    def __init__(
        self, parameters: Iterable[Tensor], states: States, compiled: bool = False, **settings: Any
    ) -> None:
        super().__init__(parameters, fused=True, **settings)
        self.states = states
        self._codes: dict[str, Tensor] = {}
        self._in_float32 = fused(_in_float32, compiled)
        self._rounded = fused(_rounded, compiled)
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
            # A group is one tensor, and so of one type.
            for kind in dict.fromkeys(kinds):
                chosen = [m and k == kind for m, k in zip(moved, kinds, strict=True)]
                for group in groups(parameters, chosen):
                    self._move(group, shards, settings)
            steps = [of["step"] for of in shards if of]
            if steps:
                torch._foreach_add_(steps, 1)
            # A step that moved nothing does not count: the bias correction goes by this number.
            if steps and self.found_inf is not None:
                torch._foreach_sub_(steps, [self.found_inf.to(steps[0].device)] * len(steps))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over moments in the types they were saved in; torch's own method would bring them to
        that of the parameters."""
        super().load_state_dict({**state_dict, "state": {}})
        numbers = [n for settings in state_dict["param_groups"] for n in settings["params"]]
        parameters = [p for settings in self.param_groups for p in settings["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            if number in state_dict["state"]:
                state = state_dict["state"][number]
                self.state[parameter] = {k: v.to(parameter.device) for k, v in state.items()}

    def _in_8_bits(self, parameter: Tensor) -> bool:
        row = prod(parameter.shape[1:])
        # By whole rows: no sharding then cuts a block, with its one scale, in two.
        return self.states == "8bit" and row % BLOCK == 0 and row > 0

    @torch.no_grad()
    def make_states(self) -> None:
        """Give every parameter the state that its first step would find."""
        for settings in self.param_groups:
            for parameter in settings["params"]:
                self._state(parameter)

    def _state(self, parameter: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self.state[parameter] or self._first_state(parameter)
        self.state[parameter] = state
        return state

    def _shards(self, parameter: Tensor) -> dict[str, Tensor]:
        tensors = {"weight": parameter, "grad": parameter.grad, **self._state(parameter)}
        return dict(zip(tensors, flat_shards(tensors.values()), strict=True))

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

    def _move(self, group: list[Stretch], shards: Shards, settings: dict[str, Any]) -> None:
        """One step of a group of elements of one type."""
        names = [name for name in shards[group[0].index] if name != "step"]
        parts = {name: [_part(stretch, shards, name) for stretch in group] for name in names}
        kept = {name: torch.cat(parts[name]) for name in names}
        device = kept["weight"].device
        if self.states == "8bit" and not self._codes:
            self._codes = {name: code_numbers(signed, device) for name, signed in MOMENTS.items()}
        flat = self._in_float32(kept, self._codes)
        sizes = [len(stretch) for stretch in group]
        weights, gradients, first, second = (
            list(flat[name].split(sizes)) for name in ("weight", "grad", *MOMENTS)
        )
        # Counts are copied: every call adds one, and a weight may lie in several groups.
        adamw(
            weights,
            gradients,
            first,
            second,
            max_exp_avg_sqs=[],
            state_steps=[shards[s.index]["step"].view(()).clone() for s in group],
            fused=True,
            # The kernel divides by it: clipping takes no pass of its own.
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
        bad = None if self.found_inf is None else self.found_inf.to(device) > 0
        words = numbers_of(group, device), word_of(self.seed, device)
        for name, values in self._rounded(flat, kept, self._codes, *words, bad).items():
            new = list(values.split([part.numel() for part in parts[name]]))
            torch._foreach_copy_(parts[name], new)


def _part(stretch: Stretch, shards: Shards, name: str) -> Tensor:
    return stretch.of(shards[stretch.index][name], BLOCK if name.endswith("_scales") else 1)


def _in_float32(kept: dict[str, Tensor], codes: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weight, gradient and moments of a group, from the types in which they are kept.

    codes: of each moment, what its codes stand for.
    """
    flat = {name: kept[name].float() for name in ("weight", "grad")}
    for name in MOMENTS:
        if name in kept:
            flat[name] = kept[name].float()
        else:
            flat[name] = decode(kept[f"{name}_codes"], kept[f"{name}_scales"], codes[name])
    return flat


def _rounded(
    flat: dict[str, Tensor],
    kept: dict[str, Tensor],
    codes: dict[str, Tensor],
    numbers: Tensor,
    seed: Tensor,
    bad: Tensor | None,
) -> dict[str, Tensor]:
    """Weight and moments of a group after a step, in the types in which they are kept.

    bad: whether the step found infinities and so moved nothing; a code's own value may be rounded
    to its neighbour.
    """
    words = random_words(seed, numbers)
    new = {}
    # Random bits of their own for each of the three: their errors must not go together.
    for part, name in enumerate(("weight", *MOMENTS)):
        if name not in kept:
            pair = encode(flat[name], codes[name], noise_of(words, part))
            for kind, values in zip((f"{name}_codes", f"{name}_scales"), pair, strict=True):
                new[kind] = values if bad is None else torch.where(bad, kept[kind], values)
        elif kept[name].dtype == torch.bfloat16:
            new[name] = round_stochastically(flat[name], noise_of(words, part))
        else:
            new[name] = flat[name]
    return new
