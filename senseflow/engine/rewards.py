"""The rewards of a configuration: named and checked before anything is loaded, then opened."""

import difflib
import importlib
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from senseflow.common.ranks import Ranks
from senseflow.config.config import Config
from senseflow.config.sections import RewardConfig
from senseflow.config.teacher import torch_dtype
from senseflow.data.items import Samples
from senseflow.data.prompt_list import PromptList
from senseflow.distill.rewards import Rewards, Scorer, with_line
from senseflow.distill.scorers.metric import Flag, Given, Machine, Spec
from senseflow.distill.scorers.specs import SCORERS

logger = logging.getLogger(__name__)

Score = Callable[..., Tensor]  # of images and prompts, and of fields where it takes them
Opened = tuple[Score, nn.Module | None]  # with all that it holds, where that is known


@dataclass(frozen=True)
class Named:
    """One reward, before its network is loaded."""

    name: str
    differentiable: bool  # whether its scores carry a gradient to the images
    open: Callable[[Ranks], Opened]
    takes_fields: bool = False  # what a table says of each prompt


Own = Callable[[str], Named]  # of the name of a user's own, `module:function`


def check_rewards(config: Config, data: Samples) -> None:
    """Raise ValueError for what cannot be a reward of a run with this data."""
    has_fields = isinstance(data, PromptList) and data.has_fields
    for named in named_rewards(config):
        if named.takes_fields and not has_fields:
            raise ValueError(
                f"reward.models {named.name} takes fields, and paths.dataset "
                f"{config.paths.dataset} has none: name a table of prompts with further columns, "
                "such as a .jsonl"
            )


def named_rewards(config: Config, own: Own | None = None) -> list[Named]:
    """What `reward.models` names; raises ValueError for what cannot be a reward of this run.

    own: in place of a user's own.
    """
    reward = config.reward
    if not reward.in_use:
        return []
    specs = {spec.name: spec for spec in SCORERS if spec.name in reward.models}
    given = given_files(reward, list(specs.values()))
    found = [
        scorer(config, specs[name], given) if name in specs else (own or own_reward)(name)
        for name in reward.models
    ]
    for named, weight in zip(found, reward.shares, strict=True):
        if reward.last_weight > 0 and weight > 0 and not named.differentiable:
            raise ValueError(
                f"reward.last_weight {reward.last_weight:g} asks for the gradient of "
                f"{named.name}, which does not say that it is differentiable: say 0 for it, or "
                "for this reward's own of reward.weights"
            )
    return found


def given_files(reward: RewardConfig, specs: list[Spec]) -> Given:
    """What `reward.files` says, by the flags of these scorers; raises ValueError."""
    flags = {flag.name.removeprefix("--"): flag for spec in specs for flag in spec.flags}
    values: dict[str, Any] = {}
    for words in reward.files:
        name, equals, text = words.partition("=")
        if not (equals and text):
            raise ValueError(f"reward.files: {words!r} is not of the form name=value")
        if name not in flags:
            known = ", ".join(flags) or "none: reward.models names no scorer of evaluate"
            raise ValueError(f"reward.files: {name} is of none of reward.models; known are {known}")
        values[flags[name].name] = read_flag(flags[name], words)
    return Given(values)


def read_flag(flag: Flag[Any], words: str) -> Any:
    """The value of `name=value` as `evaluate score` reads it; raises ValueError."""
    text = words.partition("=")[2]
    if flag.choices and text not in flag.choices:
        raise ValueError(f"reward.files {words}: must be one of {', '.join(flag.choices)}")
    if flag.kind == "pixels" and not text.isdecimal():
        raise ValueError(f"reward.files {words}: must be a whole number of pixels")
    kinds: dict[str, Callable[[str], Any]] = {"text": str, "pixels": int}
    value = kinds.get(flag.kind, Path)(text)
    with said_of(f"reward.files {words}"):
        flag.check(value)
    return value


@contextmanager
def said_of(key: str) -> Iterator[None]:
    """A scorer speaks of flags of `evaluate score`: errors say which key they are of."""
    try:
        yield
    except ValueError as error:
        raise ValueError(
            f"{key}: {error} (as --NAME VALUE is said here: reward.files=[NAME=VALUE])"
        ) from error


def scorer(config: Config, spec: Spec, given: Given) -> Named:
    """A scorer of `evaluate score`; raises ValueError for files that are not there."""
    key = f"reward.models {spec.name}"
    for flag in spec.flags:
        if flag.required and given[flag] is None:
            name = flag.name.removeprefix("--")
            raise ValueError(f"{key} needs {name}={flag.kind.upper()} in reward.files: {flag.help}")
    with said_of(key):
        prepared = spec.prepare(given)

    def open_it(ranks: Ranks) -> Opened:
        logger.info("reading the reward %s, %s", spec.name, prepared.model)
        with said_of(key):
            judge = prepared.open(Machine(ranks.device, torch_dtype(config.precision.compute)))
        if judge.tensors is None:
            raise ValueError(
                f"{key}: its processor does not resize and crop to one square as CLIP's does"
            )
        tensors = judge.tensors
        return lambda images, prompts: judge.judge(tensors(images), prompts), judge.network

    return Named(spec.name, True, open_it)


def own_reward(name: str) -> Named:
    """A user's `module:function`; raises ValueError where there is none."""
    function = imported(name)
    differentiable = bool(getattr(function, "differentiable", False))
    return Named(name, differentiable, lambda ranks: (function, None), takes_fields(function))


def takes_fields(function: Score) -> bool:
    """Whether a function names a parameter `fields`."""
    try:
        return "fields" in inspect.signature(function).parameters
    except (TypeError, ValueError):  # one of C, which says of no parameters
        return False


def parts_of(name: str) -> tuple[str, str]:
    """Module and function of `module:function`; raises ValueError for another form."""
    module_name, colon, function_name = name.partition(":")
    if not (colon and module_name and function_name):
        names = [spec.name for spec in SCORERS]
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"reward.models: {name} is neither module:function nor one of {', '.join(names)}; the "
            f"nearest is {near}"
        )
    return module_name, function_name


def imported(name: str) -> Score:
    """The function of `module:function`, its module imported; raises ValueError."""
    module_name, function_name = parts_of(name)
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a user's own code raises what it likes
        if isinstance(error, ModuleNotFoundError) and error.name == module_name:
            raise ValueError(
                f"reward.models {name}: there is no module {module_name} in the working folder or "
                "on PYTHONPATH"
            ) from error
        raise ValueError(
            f"reward.models {name}: {module_name} cannot be imported: {with_line(error)}"
        ) from error
    function: Any = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"reward.models {name}: {module_name} has no function {function_name}")
    reward: Score = function
    return reward


def open_rewards(config: Config, ranks: Ranks, own: Own | None = None) -> Rewards | None:
    """The rewards of a run on this rank's device, frozen; None where it has none.

    own: in place of a user's own.
    """
    found: Sequence[Named] = named_rewards(config, own)
    if not found:
        return None
    scorers = []
    for named, weight in zip(found, config.reward.shares, strict=True):
        score, network = named.open(ranks)
        scorers.append(
            Scorer(named.name, weight, score, named.differentiable, named.takes_fields, network)
        )
    return Rewards(scorers, ranks)
