"""LoRA: one frozen network that is teacher, student and fake score by the adapter that is active.

W x + (alpha / rank) B A x (Hu et al. 2021, arXiv 2106.09685), with peft's layers. An adapter begins
at B = 0, where every role is the teacher. A `Role` is the shared network with one adapter active,
or none, and the parameters of that adapter alone: a network argument like any other.
"""

import math
import re
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from senseflow.core.draws import Draws
from senseflow.weights.lora_settings import LoraSettings
from senseflow.weights.meta import NetworkSource
from senseflow.weights.packed import linear_layers, require_packable, with_packed
from senseflow.weights.stored import Stored, Weights

ADAPTERS = ("generator", "fake_score")
CPU = torch.device("cpu")
FACTOR = re.compile(r"(?P<layer>.+)\.(?P<factor>lora_[AB])\.(?P<adapter>\w+)\.weight")


class SharedBase:
    """A frozen network with the adapters of all roles in it, and which of them is active."""

    def __init__(self, network: nn.Module, settings: LoraSettings) -> None:
        self.network, self.trained = network, settings.train
        self.layers = {k: m for k, m in network.named_modules() if isinstance(m, LoraLayer)}
        self.active: list[str] = []
        for layer in self.layers.values():
            # The one list that all layers read in their forwards. Not peft's set_adapter, which
            # changes what requires gradients.
            layer._active_adapter = self.active

    @contextmanager
    def acting_as(self, adapters: list[str]) -> Iterator[None]:
        """These adapters are active inside; none is the plain base, bit for bit."""
        before = self.active[:]
        self.active[:] = adapters
        try:
            yield
        finally:
            self.active[:] = before

    def recompute_context(
        self,
    ) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """For activation checkpointing: a second run has the adapters of its first, whatever is
        active by then."""
        return nullcontext(), self.acting_as(self.active[:])


class Role(nn.Module):
    """The shared network as one of its roles.

    Its state dict has the keys of peft: `blocks.0.to_q.lora_A.weight`. Factors that are not trained
    are buffers. Make it when the weights are in place: it holds the very parameters that a sharded
    network keeps between its forwards.
    """

    def __init__(self, base: SharedBase, adapter: str | None) -> None:
        super().__init__()
        self.base, self.adapters = base, [adapter] if adapter else []
        for name in self.adapters:
            for path, layer in base.layers.items():
                for factor in ("lora_A", "lora_B"):
                    weight = cast(nn.Module, layer).get_submodule(f"{factor}.{name}").weight
                    assert isinstance(weight, nn.Parameter)
                    place = _submodule(self, f"{path}.{factor}")
                    if factor[-1] in base.trained:
                        place.register_parameter("weight", weight)
                    else:
                        place.register_buffer("weight", weight)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The network's own forward, with this role's adapter active."""
        with self.base.acting_as(self.adapters):
            return self.base.network(*args, **kwargs)

    def encode(self, *args: Any) -> Tensor:
        """The bottleneck's features, with this role's adapter active; the base needs the pass that
        `senseflow.distill.bottleneck.add_encoder_pass` gives it."""
        with self.base.acting_as(self.adapters):
            features: Tensor = cast(Any, self.base.network).encode(*args)
            return features


def _submodule(root: nn.Module, path: str) -> nn.Module:
    """The module at a path, with those on the way to it made where there are none."""
    for name in path.split("."):
        if name not in dict(root.named_children()):
            root.add_module(name, nn.Module())
        root = root.get_submodule(name)
    return root


def share(
    source: NetworkSource, settings: LoraSettings, device: torch.device = CPU
) -> tuple[NetworkSource, SharedBase]:
    """Put the adapters of student and fake score into a frozen network on the meta device.

    Its weights are read as before; A is drawn (uniform, as peft's own: Kaiming with a = sqrt 5) by
    seed and layer, alike for both adapters, and B is zero. Where B alone is trained, A is one
    tensor for both. Raises ValueError for targets that are in no layer.

    device: where a base in few bits is packed. Raises ValueError for layers it cannot hold.
    """
    network = source.network
    layers = layers_of(network, settings.targets)
    in_blocks = linear_layers(network, source.repeated)
    if settings.base != "bfloat16":
        require_packable(network, in_blocks, settings.base)
    with warnings.catch_warnings(action="ignore"):  # that the second adapter is not the first
        for adapter in ADAPTERS:
            config = peft_config(settings, layers)
            # Adapters on the meta device too: they are sharded before they have memory.
            inject_adapter_in_model(config, network, adapter_name=adapter, low_cpu_mem_usage=True)
    network.requires_grad_(False)
    base = SharedBase(network, settings)
    for layer in base.layers.values():
        layer.lora_B.requires_grad_(True)
        if settings.train == "B":
            # One A for both: IDA of the two B is then IDA of the products B A, exactly.
            layer.lora_A[ADAPTERS[1]] = layer.lora_A[ADAPTERS[0]]
        else:
            layer.lora_A.requires_grad_(True)
    shapes = {key: value.shape for key, value in network.state_dict().items()}

    def read(key: str) -> Stored:
        if found := FACTOR.fullmatch(key):
            return _first(found["layer"], found["factor"], shapes[key], settings.seed)
        # peft has moved the wrapped layer's own weights one level down.
        return source.read(key.replace(".base_layer.", "."))

    shared = replace(source, read=read, recompute_context=base.recompute_context)
    if settings.base != "bfloat16":
        places = [f"{k}.base_layer" if k in base.layers else k for k in in_blocks]
        shared = with_packed(shared, places, settings.base, device)
    return shared, base


def with_adapters_of(
    initial: dict[str, Weights], source: NetworkSource, train: str
) -> NetworkSource:
    """A base whose adapters begin as those of another run's roles, where it had them, not anew."""

    def read(key: str) -> Stored:
        if found := FACTOR.fullmatch(key):
            one_for_both = train == "B" and found["factor"] == "lora_A"
            weights = initial.get(ADAPTERS[0] if one_for_both else found["adapter"])
            if weights:
                return weights.read(f"{found['layer']}.{found['factor']}.weight")
        return source.read(key)

    return replace(source, read=read)


def _first(layer: str, factor: str, shape: torch.Size, seed: int) -> Tensor:
    """What a factor begins as."""
    if factor == "lora_B":
        return torch.zeros(shape)
    generator = Draws(seed, 0, ()).shared(f"lora_A {layer}")
    return nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5), generator=generator)


def peft_config(settings: LoraSettings, layers: list[str]) -> LoraConfig:
    """One adapter of these layers, without dropout; its weights are filled by `fill_shards`."""
    return LoraConfig(
        r=settings.rank,
        lora_alpha=cast(int, settings.alpha),  # any number will do
        target_modules=layers,
        init_lora_weights=False,
    )


def layers_of(network: nn.Module, targets: tuple[str, ...]) -> list[str]:
    """The linear layers and convolutions whose names end so; raises ValueError for an end of none.

    By their whole names: peft would take whatever ends so, a list of layers too (attn.to_out is a
    layer of FLUX.2's single blocks, and a list in its double ones).
    """
    kinds = nn.Linear | nn.Conv2d
    names = [name for name, module in network.named_modules() if isinstance(module, kinds)]
    found = {target: [n for n in names if f".{n}".endswith(f".{target}")] for target in targets}
    for target, layers in found.items():
        if not layers:
            raise ValueError(
                f"lora.targets: {target} is no linear layer or convolution of this teacher, which "
                f"has such as {', '.join(names[-3:])}"
            )
    return list(dict.fromkeys(name for layers in found.values() for name in layers))
