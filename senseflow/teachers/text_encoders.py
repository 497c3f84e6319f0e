"""The text encoders of a pipeline folder, of the kinds a family knows, on the meta device."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BatchEncoding,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Tokenizer,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5EncoderModel,
    T5Tokenizer,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer
from transformers.models.t5.modeling_t5 import T5Block
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from senseflow.common.devices import to_device
from senseflow.common.files import read_json
from senseflow.teachers.folder import encoder_classes
from senseflow.weights.meta import NetworkSource, frozen_network
from senseflow.weights.quantized import require_plain
from senseflow.weights.stored import Stored, Weights, component_weights


@dataclass(frozen=True)
class TextEncoder:
    """A kind of text encoder, by its class in transformers, with its tokenizer."""

    network: type[PreTrainedModel]
    layer: type[nn.Module]  # each one a unit of sharding
    tokenizer: Callable[[int], PreTrainedTokenizerBase]  # one that knows a letter, of this length
    # what says the next word, or sees: no pipeline asks it, and it is neither read nor run
    unasked: tuple[str, ...] = ()


Kinds = Sequence[TextEncoder]


class TokensOnDevice:
    """A pipeline's tokenizer, whose tokens are where the pipeline will copy them, which is then no
    copy: its own, from memory that may be paged out, would wait for all that the device has to do.

    device: of the text encoders.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> None:
        self.tokenizer, self.device = tokenizer, device

    def __call__(self, prompts: list[str], **how: Any) -> BatchEncoding:
        """The tokens of prompts, as the tokenizer is asked for them."""
        if how == {"padding": "longest", "return_tensors": "pt"}:
            # All words, to say which were cut off: the two would be compared on the device, and
            # python -m senseflow.data.check says it once for all. These are too few to ask.
            return BatchEncoding({"input_ids": torch.empty(len(prompts), 0, dtype=torch.long)})
        tokens = self.tokenizer(prompts, **how)
        return BatchEncoding({k: to_device(v, self.device) for k, v in tokens.items()})

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


def put_tokens_on(device: torch.device, pipeline: Any) -> None:
    """Have the tokenizers of a pipeline put their tokens on the device of its text encoders.

    Not Qwen's, which no pipeline asks: `senseflow.teachers.chat` needs its mask on the host.
    """
    for name, part in pipeline.components.items():
        is_tokenizer = isinstance(part, PreTrainedTokenizerBase)
        if is_tokenizer and not isinstance(part, Qwen2Tokenizer):
            setattr(pipeline, name, TokensOnDevice(part, device))


def clip_tokenizer(length: int) -> CLIPTokenizer:
    """CLIP's, with the letter a."""
    vocab = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a": 2, "a</w>": 3}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=length)


def t5_tokenizer(length: int) -> T5Tokenizer:
    """T5's, with the letter a."""
    pieces = [(piece, -1.0) for piece in ("<pad>", "</s>", "<unk>", "a")]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=length)


def qwen_tokenizer(length: int) -> Qwen2Tokenizer:
    """Qwen's, with the letter a and a chat template in its real one's structure."""
    marks = ["<|im_start|>", "<|im_end|>"]
    vocab = {piece: number for number, piece in enumerate(["<|endoftext|>", *marks, "a"])}
    return Qwen2Tokenizer(
        vocab=vocab,
        additional_special_tokens=marks,
        model_max_length=length,
        chat_template=CHAT_TEMPLATE,
    )


CHAT_TEMPLATE = (
    "{% for turn in messages %}<|im_start|>{{ turn.role }}\n{{ turn.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)

CLIP = TextEncoder(CLIPTextModel, CLIPEncoderLayer, clip_tokenizer)
PROJECTED_CLIP = TextEncoder(CLIPTextModelWithProjection, CLIPEncoderLayer, clip_tokenizer)
T5 = TextEncoder(T5EncoderModel, T5Block, t5_tokenizer)
QWEN3 = (  # with its head or without, as a folder has it
    TextEncoder(Qwen3ForCausalLM, Qwen3DecoderLayer, qwen_tokenizer, unasked=("lm_head",)),
    TextEncoder(Qwen3Model, Qwen3DecoderLayer, qwen_tokenizer),
)


def kind_of(folder: Path, class_name: str, kinds: Kinds) -> TextEncoder:
    """The kind of an encoder's folder; raises ValueError, naming it, for none of `kinds`."""
    named = {kind.network.__name__: kind for kind in kinds}
    if class_name not in named:
        raise ValueError(f"{folder} holds a {class_name}, not one of {', '.join(named)}")
    return named[class_name]


def text_encoders(folder: Path, kinds: Kinds, dtype: torch.dtype) -> dict[str, NetworkSource]:
    """The frozen text encoders that the model_index.json of a pipeline folder names, by component.

    Those it says are null (SD3.5 without T5) are left out. Raises ValueError as `text_encoder`.
    """
    return {
        name: text_encoder(folder / name, kind_of(folder / name, class_name, kinds), dtype)
        for name, class_name in encoder_classes(folder).items()
        if class_name
    }


def text_encoder(folder: Path, kind: TextEncoder, dtype: torch.dtype) -> NetworkSource:
    """One frozen encoder in its own dtype, a unit of sharding per layer.

    Raises ValueError, naming the folder, for weights that lack keys or have other shapes than
    config.json says. Keys beyond the encoder's are not read.
    """
    file = folder / "config.json"
    tree = read_json(file)
    require_plain(str(file), tree)
    config = kind.network.config_class.from_dict(tree)
    with torch.device("meta"):
        network = kind.network(config)
    for name in kind.unasked:
        network.set_submodule(name, nn.Identity())
    weights = in_names_of(network, component_weights(folder))
    weights.require(network.state_dict())
    computed = position_ids(network) | frequencies(network)

    def read(key: str) -> Stored:
        return computed[key] if key in computed else weights.read(key)

    blocks = [module for module in network.modules() if isinstance(module, kind.layer)]
    source = frozen_network(NetworkSource(network, read, blocks), dtype)
    for rotary in rotaries(network).values():
        rotary.float()  # as transformers computes them, whatever the network's type
    if dtype == torch.float16:
        # As transformers reads them: T5's last products overflow float16.
        for name, module in network.named_modules():
            if name.rpartition(".")[2] in (network._keep_in_fp32_modules or ()):
                module.float()
    return source


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


def rotaries(network: PreTrainedModel) -> dict[str, Any]:
    """The modules of rotary positions, by name: each has the config that it is made of."""
    modules = network.named_modules()
    return {name: module for name, module in modules if hasattr(module, "original_inv_freq")}


def frequencies(network: PreTrainedModel) -> dict[str, Tensor]:
    """The buffers of rotary positions, by name: computed of the config, and in no file."""
    return {
        f"{name}.{key}": buffer
        for name, rotary in rotaries(network).items()
        for key, buffer in type(rotary)(rotary.config).named_buffers()
    }
