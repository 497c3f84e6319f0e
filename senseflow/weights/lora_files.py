"""LoRA files as people have them, read into one form; and the form that we write.

An update of W is (alpha / rank) B A. Files call a layer by diffusers' path or by its authors', with
dots or underscores, behind this prefix or that, its factors A and B or down and up; alpha is a
tensor, stands in the header, or is left out and then the rank. Readers differ in what they know of
that, and leave out the rest. So each layer of a network is looked for under all of its names, what
is left over fits nowhere and can be said, and what is written has its scale in B, for readers of
the header, of tensors, and of neither.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.peft import PeftAdapterMixin
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from torch import Size, Tensor, nn

from senseflow.common.files import parse_json, read_json
from senseflow.weights.original import Plan, Rows
from senseflow.weights.stored import Weights

METADATA = "lora_adapter_metadata"  # diffusers' key of a file's header
FACTOR = re.compile(  # X.lora_A.weight, X.lora_down.weight, X.lora.down.weight, X_lora.down.weight
    r"(?P<layer>.+?)(?:\.lora_linear_layer|[._]lora)?"
    r"\.(?:lora_)?(?P<factor>A|B|down|up)(?:\.default)?\.weight"
)
FACTORS = {"A": "lora_A", "down": "lora_A", "B": "lora_B", "up": "lora_B"}
PASSED_ON = ("lora_magnitude_vector", "lora_B.bias")  # DoRA and biases, as peft reads them
OTHER_KINDS = {  # by what the names of their tensors hold
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "dora_scale": "DoRA in LyCORIS' form",
    "lora_mid": "a convolution in three factors",
    "diff": "whole differences",
}
NAMED = 5  # layers in a message
ENCODERS_ADAPTER = "default_0"  # the name of the only one of a text encoder


@dataclass(frozen=True)
class Component:
    """A network that adapters may be for: its folder in a pipeline, and its layers."""

    name: str
    shapes: Mapping[str, Size]  # of the layers' weights
    kohya: Callable[[str], str] | None = None  # a layer in kohya's files, where not diffusers' path
    authors: Callable[[], Plan] | None = None  # its layers as rows of its authors' layers; seconds
    xlabs: Callable[[str], tuple[str, int | None] | None] | None = None  # `OriginalNames.adapter`
    encoder: int = 0  # which of the text encoders, counted from 1; 0: what denoises

    def aliases(self, layer: str) -> Iterator[str]:
        """Every name that files have for a layer."""
        if self.encoder:
            yield from self._encoder_aliases(layer)
            return
        flat = layer.replace(".", "_")
        yield from (f"{self.name}.{layer}", layer, f"diffusion_model.{layer}")
        yield from (f"base_model.model.{layer}", f"{self.name}.base_model.model.{layer}")
        yield from (f"{prefix}_{flat}" for prefix in ("lora_unet", "lora_transformer", "lycoris"))
        if self.kohya:
            name = self.kohya(layer)
            yield from (name, f"diffusion_model.{name}", f"lora_unet_{name.replace('.', '_')}")

    def _encoder_aliases(self, layer: str) -> Iterator[str]:
        """Of CLIP: with and without the level that transformers has dropped since."""
        prefixes = [f"lora_te{self.encoder}_", *(["lora_te_"] if self.encoder == 1 else [])]
        bare = layer.removeprefix("text_model.")
        for path in (bare, f"text_model.{bare}"):
            older = re.sub(r"(?<=self_attn\.)(q|k|v|out)_proj$", r"to_\1", path)  # diffusers'
            yield from (f"{self.name}.{path}", f"{self.name}.{older}")
            yield from (prefix + path.replace(".", "_") for prefix in prefixes)


@dataclass
class _Layer:
    """What a file has of one layer, by its own keys."""

    keys: dict[str, str] = field(default_factory=dict)  # lora_A, lora_B, and what is passed on
    alpha: str | None = None
    kind: str | None = None  # of what is not read


@dataclass(frozen=True)
class Lora:
    """Adapters in peft's names, `unet.X.lora_A.weight`, with W + B A."""

    file: Path
    tensors: dict[str, Tensor]
    num_layers: int  # of the file
    lost: dict[str, str]  # layers of the file that fit nowhere, and why

    def of(self, component: str) -> dict[str, Tensor]:
        """One network's adapters, by their keys in it."""
        prefix = f"{component}."
        return {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}

    def said(self) -> str:
        """How many layers are not used, and which."""
        parts = []
        for reason in dict.fromkeys(self.lost.values()):
            layers = [layer for layer, why in self.lost.items() if why == reason]
            more = ", ..." if len(layers) > NAMED else ""
            num = f"{len(layers)} " if len(layers) < len(self.lost) else ""
            parts.append(f"{num}{reason}: {', '.join(layers[:NAMED])}{more}")
        return f"{len(self.lost)} of its {self.num_layers} layers fit nowhere ({'; '.join(parts)})"

    def require_all(self, way_on: str = "") -> None:
        """Raise ValueError where a part of the file fits nowhere."""
        if self.lost:
            raise ValueError(f"the LoRA {self.file} does not fit: {self.said()}{way_on}")


def is_lora(keys: Iterable[str]) -> bool:
    """Whether weights are adapters, of whatever kind, by their keys."""
    return any(FACTOR.fullmatch(key) or _other_kind(key) for key in keys)


def _other_kind(key: str) -> str | None:
    last = key.rpartition(".")[2]
    return next((kind for mark, kind in OTHER_KINDS.items() if last.startswith(mark)), None)


def read_lora(weights: Weights, components: list[Component]) -> Lora:
    """The adapters in a file for some networks of a pipeline, and what in it is for none of them.

    Raises ValueError for a damaged file.
    """
    known = {
        name: (c, layer) for c in components for layer in c.shapes for name in c.aliases(layer)
    }
    config = _adapter_config(weights.source)
    tensors: dict[str, Tensor] = {}
    lost: dict[str, str] = {}
    layers = _layers(weights.keys)
    fused = _by_authors(components) if any(_place(name, known) is None for name in layers) else {}
    for name, layer in layers.items():
        found = _read_layer(weights, name, layer, config)
        if isinstance(found, str):
            lost[name] = found
            continue
        fitting, reason = _fitting(_taken_apart(found, fused.get(name, {name: []})), known)
        tensors |= fitting
        if reason:
            lost[name] = reason
    return Lora(weights.source, tensors, len(layers), lost)


def _layers(keys: Iterable[str]) -> dict[str, _Layer]:
    """The keys of a file by layer."""
    layers: dict[str, _Layer] = {}
    for key in keys:
        if found := FACTOR.fullmatch(key):
            layers.setdefault(found["layer"], _Layer()).keys[FACTORS[found["factor"]]] = key
            continue
        passed = next((part for part in PASSED_ON if f".{part}" in key), None)
        if passed:
            layers.setdefault(key.rpartition(f".{passed}")[0], _Layer()).keys[passed] = key
        elif key.endswith(".alpha"):
            layers.setdefault(key.removesuffix(".alpha"), _Layer()).alpha = key
        else:
            name = key.rpartition(".")[0] if _other_kind(key) else key
            layers.setdefault(name, _Layer()).kind = _other_kind(key) or "no factors"
    return layers


def _read_layer(
    weights: Weights, name: str, layer: _Layer, config: dict[str, Any]
) -> dict[str, Tensor] | str:
    """A layer's tensors with the scale in B; or why it is not read."""
    if layer.kind:
        return f"of a kind that is not read, {layer.kind}"
    if not {"lora_A", "lora_B"} <= layer.keys.keys():
        return "without one of the two factors"
    found = {part: weights.tensor(key) for part, key in layer.keys.items()}
    rank = len(found["lora_A"])
    if layer.alpha:
        scale = float(weights.tensor(layer.alpha)) / rank
    else:
        scale = _stated_scale(config, name, rank)
    return found if scale == 1 else _scaled(found, scale)


def _scaled(found: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """B times the scale: in its own type where that is exact, as for powers of two."""
    exact = found["lora_B"].float() * scale
    own = exact.to(found["lora_B"].dtype)
    if bool((own.float() == exact).all()):
        return found | {"lora_B": own}
    return {part: value.float() for part, value in found.items()} | {"lora_B": exact}


def _adapter_config(file: Path) -> dict[str, Any]:
    """What diffusers keeps of peft's configuration in the header, or peft beside its file."""
    beside = file.parent / "adapter_config.json"
    if beside.is_file():
        return read_json(beside)
    if file.suffix != ".safetensors":
        return {}
    with safe_open(str(file), framework="pt") as opened:
        header = opened.metadata() or {}
    where = f"{file}: {METADATA} in its header"
    config = parse_json(header.get(METADATA, "{}"), where)
    if not isinstance(config, dict):
        raise ValueError(f"{where} is no JSON object")
    return config


def _stated_scale(config: dict[str, Any], name: str, rank: int) -> float:
    """alpha / rank of a layer by peft's configuration; 1 where it says nothing."""
    component = name.partition(".")[0]
    own = {k.removeprefix(f"{component}."): v for k, v in config.items()}
    patterns = own.get("alpha_pattern") or {}
    layer = name.removeprefix(f"{component}.")
    alpha = patterns.get(get_pattern_key(list(patterns), layer), own.get("lora_alpha", rank))
    return float(alpha) / (rank**0.5 if own.get("use_rslora") else rank)


def _place(name: str, known: dict[str, tuple[Component, str]]) -> tuple[Component, str] | None:
    """The layer of this name; by diffusers' older path of attention only where none has it, for
    FLUX.2's blocks of one stream have a `to_out` of their own."""
    older = name.replace(".processor.", ".")
    return known.get(name) or known.get(f"{older}.0" if older.endswith(".to_out") else older)


def _by_authors(components: list[Component]) -> dict[str, dict[str, list[Rows]]]:
    """By the names in files of a layer of the authors', the layers that are some rows of it."""
    found: dict[str, dict[str, list[Rows]]] = {}
    for component in components:
        for key, rows in (component.authors() if component.authors else {}).items():
            name = rows[0].key.removesuffix(".weight")
            if not key.endswith(".weight"):
                continue
            layer = f"{component.name}.{key.removesuffix('.weight')}"
            flat = name.replace(".", "_")
            for alias in (name, f"diffusion_model.{name}", f"lora_unet_{flat}", f"lycoris_{flat}"):
                found.setdefault(alias, {})[layer] = rows
        for layer in component.shapes:
            if component.xlabs and (place := component.xlabs(layer)):
                name, third = place
                rows = (
                    []
                    if third is None
                    else [Rows(name, Fraction(third, 3), Fraction(third + 1, 3))]
                )
                for alias in (name, f"diffusion_model.{name}"):
                    found.setdefault(alias, {})[f"{component.name}.{layer}"] = rows
    return found


def _taken_apart(
    found: dict[str, Tensor], layers: dict[str, list[Rows]]
) -> dict[str, dict[str, Tensor]]:
    """The adapters of the layers that are rows of one: A is all of theirs, B by its rows."""

    def part(value: Tensor, rows: list[Rows]) -> Tensor:
        # of another width an end may lie within a row: what comes out has another shape, too
        ends = [(int(r.start * len(value)), int(r.stop * len(value))) for r in rows]
        return torch.cat([value[start:stop] for start, stop in ends])

    return {
        layer: {k: v if k == "lora_A" or not rows else part(v, rows) for k, v in found.items()}
        for layer, rows in layers.items()
    }


def _fitting(
    renamed: dict[str, dict[str, Tensor]], known: dict[str, tuple[Component, str]]
) -> tuple[dict[str, Tensor], str | None]:
    """The tensors of layers that are there, in peft's names; and why not all of them are."""
    tensors: dict[str, Tensor] = {}
    for name, found in renamed.items():
        if (place := _place(name, known)) is None:
            return {}, "not part of the network"
        component, layer = place
        weight, rank = component.shapes[layer], len(found["lora_A"])
        a, b = found["lora_A"], found["lora_B"]
        # a 1 x 1 convolution for a linear layer, or the other way round, is the same numbers
        fits = a.numel() == rank * weight[1:].numel() and b.numel() == weight[0] * rank
        if not fits or b.shape[1] != rank:
            return {}, "of another shape than the network's"
        shaped = {
            "lora_A.weight": a.reshape(rank, *weight[1:]),
            "lora_B.weight": b.reshape(weight[0], rank, *(1,) * (len(weight) - 2)),
            **{part: found[part] for part in PASSED_ON if part in found},
        }
        tensors |= {f"{component.name}.{layer}.{part}": value for part, value in shaped.items()}
    return tensors, None


def layer_shapes(weights: Weights) -> dict[str, Size]:
    """The layers of a network, by their weights in a file."""
    shapes = {
        key.removesuffix(".weight"): weights.read(key).shape
        for key in weights.keys
        if key.endswith(".weight")
    }
    return {layer: Size(shape) for layer, shape in shapes.items() if len(shape) > 1}


def add_adapters(network: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put adapters into a network of diffusers or of transformers, beside those that are there.

    tensors: by keys in the network. Nothing is left for a loader to rename.
    """
    if isinstance(network, PeftAdapterMixin):
        network.load_lora_adapter(tensors, prefix=None)
        network.set_adapters(list(network.peft_config))
        return
    layers = {key.rpartition(".lora_")[0]: len(v) for key, v in tensors.items() if "lora_A" in key}
    ranks = {f"^{re.escape(layer)}": rank for layer, rank in layers.items()}
    config = LoraConfig(
        r=1, lora_alpha=1, target_modules=list(layers), rank_pattern=ranks, alpha_pattern=ranks
    )
    inject_adapter_in_model(config, network, ENCODERS_ADAPTER, state_dict=tensors)
    set_peft_model_state_dict(network, tensors, ENCODERS_ADAPTER)


# What is written


def written_key(component: str, kohya: Callable[[str], str] | None, key: str) -> str:
    """The key in a file of a layer's factor, `X.lora_A.weight`.

    Where kohya names the layers it is `lora_unet_X.lora_down.weight`, which ComfyUI, InvokeAI and
    stable-diffusion.cpp know for a UNet; else diffusers', which they know for transformers.
    """
    if kohya is None:
        return f"{component}.{key}"
    layer, _, factor = key.removesuffix(".weight").rpartition(".lora_")
    down_or_up = {"A": "down", "B": "up"}[factor]
    return f"lora_unet_{kohya(layer).replace('.', '_')}.lora_{down_or_up}.weight"
