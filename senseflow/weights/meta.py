"""Networks on the meta device, where their weights are read, and their units of sharding."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import noop_context_fn

from senseflow.weights.stored import Stored, Weights, component_weights

if TYPE_CHECKING:
    from diffusers import ModelMixin

Blocks = Callable[[Any], list[nn.Module]]  # parts of a network, in the order in which they run


@dataclass(frozen=True)
class NetworkSource:
    """A network on the meta device, where each of its tensors is read, and what it is made of."""

    network: nn.Module
    read: Callable[[str], Stored]  # a parameter or buffer by name; KeyError if there is none
    blocks: list[nn.Module]  # the units of sharding, in the order in which they run
    repeated: list[nn.Module] = field(default_factory=list)  # those recomputed, and compiled
    recompute_context: Callable[[], tuple[Any, Any]] = noop_context_fn  # of a first and second run


Build = Callable[[NetworkSource], nn.Module]  # puts a network with its weights on its device


def open_network(
    network_class: "type[ModelMixin]",
    folder: Path,
    config: dict[str, Any],
    blocks_of: Blocks,
    spare: str | None = None,
) -> tuple[NetworkSource, Weights]:
    """The network of `config` with the weights of a component folder, and those weights.

    spare: the beginning of keys the weights may hold beyond the network's.
    Raises ValueError for a config of another class and for weights that do not fit it.
    """
    weights = component_weights(folder)
    network = meta_network(network_class, config)
    weights.require(network.state_dict(), spare=spare)
    return NetworkSource(network, weights.read, blocks_of(network)), weights


def frozen_network(source: NetworkSource, dtype: torch.dtype) -> NetworkSource:
    """A teacher's network: in its own dtype, eval mode, without gradients."""
    source.network.to(dtype).eval().requires_grad_(False)
    return source


def meta_network(network_class: "type[ModelMixin]", config: dict[str, Any]) -> Any:
    """A diffusers network on the meta device, in float32."""
    name = network_class.__name__
    if config.get("_class_name", name) != name:
        raise ValueError(f"expected a {name}, got {config['_class_name']}")
    with torch.device("meta"):
        return network_class.from_config(config)


def in_turn(name: str, layers: Iterable[nn.Module]) -> Callable[[str], Stored]:
    """Where the tensors of a network's list of layers, its attribute `name`, are read: in their
    order, each layer made when its first tensor is asked for and the one before it let go."""
    numbered, state = enumerate(layers), dict[str, Tensor]()

    def read(key: str) -> Tensor:
        while key not in state:
            state.clear()
            number, layer = next(numbered)
            state.update({f"{name}.{number}.{k}": v for k, v in layer.state_dict().items()})
        return state[key]

    return read


def seeded(seed: int, makers: Iterable[Callable[[], nn.Module]]) -> Iterator[nn.Module]:
    """Layers made one after the other with the random numbers of a seed; the global generator is
    left as it was. One that is made within `torch.device("meta")` draws none."""
    drawn = torch.Generator().manual_seed(seed).get_state()
    for make in makers:
        # Drawn on every rank alike, so the run's own generator must not feel it.
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(drawn)
            layer = make()
            drawn = torch.get_rng_state()
        yield layer
