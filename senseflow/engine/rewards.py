"""The rewards of a configuration: named and checked before anything is loaded, then opened."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from senseflow.common.ranks import Ranks
from senseflow.config.config import Config
from senseflow.distill.rewards import Rewards, Scorer


@dataclass(frozen=True)
class Named:
    """One reward, before its network is loaded."""

    name: str
    differentiable: bool  # whether its scores carry a gradient to the images
    open: Callable[[Ranks], Callable[[Tensor, list[str]], Tensor]]


def named_rewards(config: Config) -> list[Named]:
    """What `reward.models` names; raises ValueError for what cannot be a reward of this run."""
    reward = config.reward
    if not reward.in_use:
        return []
    found = [own_reward(name) for name in reward.models]
    for named, weight in zip(found, reward.shares, strict=True):
        if reward.last_weight > 0 and weight > 0 and not named.differentiable:
            raise ValueError(
                f"reward.last_weight {reward.last_weight:g} asks for the gradient of "
                f"{named.name}, which does not say that it is differentiable: say 0 for it, or "
                "for this reward's own of reward.weights"
            )
    return found


def own_reward(name: str) -> Named:
    """A user's `module:function`; raises ValueError where there is none."""
    function = imported(name)
    return Named(name, bool(getattr(function, "differentiable", False)), lambda ranks: function)


def imported(name: str) -> Callable[[Tensor, list[str]], Tensor]:
    """The function of `module:function`, its module imported; raises ValueError."""
    module_name, colon, function_name = name.partition(":")
    if not (colon and module_name and function_name):
        raise ValueError(f"reward.models: {name} is not module:function")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a user's own code raises what it likes
        if isinstance(error, ModuleNotFoundError) and error.name == module_name:
            raise ValueError(
                f"reward.models {name}: there is no module {module_name} in the working folder or "
                "on PYTHONPATH"
            ) from error
        raise ValueError(
            f"reward.models {name}: {module_name} cannot be imported: {error!r}"
        ) from error
    function: Any = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"reward.models {name}: {module_name} has no function {function_name}")
    reward: Callable[[Tensor, list[str]], Tensor] = function
    return reward


def open_rewards(config: Config, ranks: Ranks) -> Rewards | None:
    """The rewards of a run on this rank's device, frozen; None where it has none."""
    found: Sequence[Named] = named_rewards(config)
    if not found:
        return None
    pairs = zip(found, config.reward.shares, strict=True)
    scorers = [Scorer(n.name, weight, n.open(ranks), n.differentiable) for n, weight in pairs]
    return Rewards(scorers, ranks)
