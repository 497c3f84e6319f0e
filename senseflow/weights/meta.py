"""Networks on the meta device, where their weights are read, and their units of sharding."""

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import noop_context_fn

from senseflow.common.files import read_json
from senseflow.weights.quantized import require_plain
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
    network = meta_network(network_class, config, str(folder))
    weights = in_todays_names(network, component_weights(folder))
    weights.require(network.state_dict(), spare=spare)
    return NetworkSource(network, weights.read, blocks_of(network)), weights


def component(
    folder: Path, dtype: torch.dtype, network_class: "type[ModelMixin] | None" = None
) -> NetworkSource:
    """A frozen network of diffusers that is not sharded, such as a VAE.

    network_class: what it must be; None: what its config.json says. Raises ValueError, naming the
    folder, for another class, and for weights that lack keys or have other shapes.
    """
    file = folder / "config.json"
    config = read_json(file)
    wanted = network_class or class_in(config, str(file))
    source, _ = open_network(wanted, folder, config, lambda network: [])
    return frozen_network(source, dtype)


def class_in(config: dict[str, Any], name: str) -> "type[ModelMixin]":
    """The class of a diffusers network's config; name: what it is called in the ValueError."""
    import diffusers

    said = config.get("_class_name")
    found = getattr(diffusers, said, None) if isinstance(said, str) else None
    if not isinstance(found, type) or not issubclass(found, diffusers.ModelMixin):
        raise ValueError(f"{name}: _class_name {said!r} is not a network of diffusers")
    return found


def in_todays_names(network: "ModelMixin", weights: Weights) -> Weights:
    """The weights under the network's own names, by diffusers' own renaming of saved keys: the
    attention of an older VAE is `query` where today's is `to_q`."""
    names = {key: key for key in weights.keys}
    network._fix_state_dict_keys_on_load(names)
    if list(names) == weights.keys:
        return weights
    return replace(weights, keys=list(names), read=lambda key: weights.read(names[key]))


def frozen_network(source: NetworkSource, dtype: torch.dtype) -> NetworkSource:
    """A teacher's network: in its own dtype, eval mode, without gradients."""
    # torch's own: diffusers' warns that some networks have modules to be kept in float32.
    nn.Module.to(source.network, dtype).eval().requires_grad_(False)
    return source


def meta_network(
    network_class: "type[ModelMixin]", config: dict[str, Any], name: str = "config.json"
) -> Any:
    """A diffusers network on the meta device, in float32.

    name: what the config is called in the ValueError for one of another class or of quantized
    weights.
    """
    wanted = network_class.__name__
    if config.get("_class_name", wanted) != wanted:
        raise ValueError(f"{name}: expected a {wanted}, got {config['_class_name']}")
    require_plain(name, config)
    with torch.device("meta"):
        network = network_class.from_config(config)
    for part, module in tabled(network):
        # made again, with numbers: of the arguments that it has kept under their names
        arguments = inspect.signature(type(module)).parameters
        network.set_submodule(part, type(module)(*(vars(module)[key] for key in arguments)))
    return network


def tabled(network: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules, by name, that keep computed tensors as plain attributes, neither parameters nor
    buffers: what gives a meta network memory passes them over."""
    return [
        (name, module)
        for name, module in network.named_modules()
        if any(isinstance(value, Tensor) for value in vars(module).values())
    ]


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
