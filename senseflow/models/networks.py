"""Networks on the meta device, where their weights are read, and their units of sharding."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from senseflow.models.weights import Weights, component_weights

Blocks = Callable[[Any], list[nn.Module]]  # a network's units of sharding


@dataclass(frozen=True)
class NetworkSource:
    """A network on the meta device and where each of its weights is read."""

    network: nn.Module
    read: Callable[[str], Tensor]
    blocks: list[nn.Module]  # the units of sharding


def open_network(
    network_class: type[ModelMixin],
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
    """The same as a teacher: in its own dtype, eval mode, without gradients."""
    source.network.to(dtype).eval().requires_grad_(False)
    return source


def meta_network(network_class: type[ModelMixin], config: dict[str, Any]) -> Any:
    """A diffusers network on the meta device, in float32."""
    name = network_class.__name__
    if config.get("_class_name", name) != name:
        raise ValueError(f"expected a {name}, got {config['_class_name']}")
    with torch.device("meta"):
        return network_class.from_config(config)


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object; a missing or broken file is a ValueError that names it."""
    if not file.is_file():
        raise ValueError(f"{file} not found")
    try:
        tree = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{file} holds no JSON object")
    return tree
