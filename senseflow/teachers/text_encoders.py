"""The text encoders of a pipeline folder (CLIP, OpenCLIP bigG, T5), on the meta device."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedModel,
    T5EncoderModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.models.t5.modeling_t5 import T5Block
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from senseflow.common.files import read_json
from senseflow.teachers.folder import encoder_classes
from senseflow.weights.meta import NetworkSource, frozen_network
from senseflow.weights.stored import Stored, Weights, component_weights

CLASSES = {
    encoder.__name__: encoder
    for encoder in (CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel)
}
LAYERS = (CLIPEncoderLayer, T5Block)


def text_encoders(folder: Path, dtype: torch.dtype) -> dict[str, NetworkSource]:
    """The frozen text encoders that the model_index.json of a pipeline folder names, by component.

    Those it says are null (SD3.5 without T5) are left out. Raises ValueError as `text_encoder`.
    """
    return {
        name: text_encoder(folder / name, class_name, dtype)
        for name, class_name in encoder_classes(folder).items()
        if class_name
    }


def text_encoder(folder: Path, class_name: str, dtype: torch.dtype) -> NetworkSource:
    """One frozen encoder in its own dtype, a unit of sharding per layer.

    Raises ValueError, naming the folder, for a class that is none of CLASSES and for weights that
    lack keys or have other shapes than config.json says. Keys beyond the encoder's are not read.
    """
    if class_name not in CLASSES:
        raise ValueError(f"{folder} holds a {class_name}, not one of {', '.join(CLASSES)}")
    read_json(folder / "config.json")  # says what is wrong with it in one line
    config = CLASSES[class_name].config_class.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        network = CLASSES[class_name](config)
    weights = in_names_of(network, component_weights(folder))
    weights.require(network.state_dict())
    positions = position_ids(network)

    def read(key: str) -> Stored:
        return positions[key] if key in positions else weights.read(key)

    blocks = [module for module in network.modules() if isinstance(module, LAYERS)]
    return frozen_network(NetworkSource(network, read, blocks), dtype)


def in_names_of(network: PreTrainedModel, weights: Weights) -> Weights:
    """The weights under the network's own names, by transformers' own renaming of saved keys.

    A tensor that the network ties to another stands in a file under one of the two names.
    """
    conversions = get_model_conversion_mapping(network)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    wanted, prefix = network.state_dict(), network.base_model_prefix
    saved = {rename_source_key(k, renamings, [], prefix, wanted)[0]: k for k in weights.keys}
    for one, other in network.all_tied_weights_keys.items():
        saved |= {new: saved[old] for new, old in ((one, other), (other, one)) if old in saved}
    held = [key for key in wanted if key in saved]
    return replace(weights, keys=held, read=lambda key: weights.read(saved[key]))


def keep_recording(network: PreTrainedModel) -> PreTrainedModel:
    """Let a network return hidden states when asked to, after sharding too: transformers looks up
    what it can record under the name of its class, and FSDP2 has given it another class."""
    _CAN_RECORD_REGISTRY[network] = network.can_record_outputs
    return network


def position_ids(network: PreTrainedModel) -> dict[str, Tensor]:
    """CLIP's buffer of positions (1, L), by name: 0 to L - 1, which is computed and never read."""
    return {
        name: torch.arange(buffer.shape[-1]).expand(buffer.shape)
        for name, buffer in network.named_buffers()
        if name.endswith("position_ids")
    }
