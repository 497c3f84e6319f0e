"""A family's network as files hold it: by its authors' names, in LoRA files, packed.

Not light, unlike `senseflow.teachers.family`: tensors are read here.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
from torch import nn

from senseflow.core.names import BaseForm
from senseflow.teachers.family import Family
from senseflow.teachers.folder import base_config
from senseflow.weights.lora_files import Component, layer_shapes, written_key
from senseflow.weights.meta import meta_network
from senseflow.weights.original import Rows, converted, to_diffusers
from senseflow.weights.packed import as_packed, linear_layers
from senseflow.weights.stored import Weights, component_weights


def in_diffusers_names(family: Family, weights: Weights, config: dict[str, Any]) -> Weights:
    """Weights of a network with this config; those by its authors' names are converted.

    Raises ValueError naming keys when a file of the authors does not fit the config.
    """
    original = family.original
    if original is None or original.mark is None:
        return weights
    if any(key.startswith(family.key_mark) for key in weights.keys):
        return weights
    network, name = _network(family, config), original.of(config)
    own = network.state_dict().keys()
    if ({name(key) for key in own} - own).isdisjoint(weights.keys):
        return weights  # neither's: what misses is named by diffusers' names
    return converted(weights, network, name, original.prefix, original.title)


def base_weights(family: Family, base: Path, form: BaseForm) -> Weights:
    """The network's weights in a base's folder, as a LoRA run has them with a base of this form;
    raises ValueError where what packs is not installed."""
    weights = component_weights(base / family.component)
    if form == "bfloat16":
        return weights
    network = _network(family, base_config(base, family.component))
    return as_packed(weights, linear_layers(network, family.networks().repeated_of(network)), form)


def lora_key(family: Family, base: Path) -> Callable[[str], str]:
    """The key in a LoRA file that we write of a layer's factor, `X.lora_A.weight`."""
    return partial(written_key, family.component, family.kohya_names(base))


def adapted(family: Family, base: Path, weights: Weights | None = None) -> Component:
    """The network that LoRA files are for; weights: a student's, else the base's own."""
    weights = component_weights(base / family.component) if weights is None else weights
    kohya, authors = family.kohya_names(base), partial(_by_authors, family, base)
    shapes, xlabs = layer_shapes(weights), family.original.adapter if family.original else None
    return Component(family.component, shapes, kohya, None if kohya else authors, xlabs)


def _by_authors(family: Family, base: Path) -> Mapping[str, list[Rows]]:
    """The base's tensors as rows of its authors'; none of a network their files cannot hold."""
    original, config = family.original, base_config(base, family.component)
    if original is None:
        return {}
    name = original.of(config)
    try:
        return to_diffusers(_network(family, config), name, original.prefix)
    except ValueError:
        return {}


def _network(family: Family, config: dict[str, Any]) -> nn.Module:
    """A network with this config, on the meta device."""
    network: nn.Module = meta_network(getattr(diffusers, family.network_class), config)
    return network
