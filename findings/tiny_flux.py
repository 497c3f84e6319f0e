"""For scripts about FLUX and its LoRA: a small transformer, a LoRA for it, and one call.

Prints the versions of what it is about, and ends where they are not the pinned ones.
"""

import diffusers
import peft
import torch
from diffusers import FluxTransformer2DModel

ATTENTION = ("to_q", "to_k", "to_v")
LORA_OF = {"prefix": None, "adapter_name": "a"}

versions = (diffusers.__version__, peft.__version__)
print("diffusers {}, peft {}".format(*versions))
assert versions == ("0.42.1", "0.21.2"), "other versions than the pinned ones"


def make_network():
    """A few thousand weights, the same each time."""
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        guidance_embeds=False,
        axes_dims_rope=(4, 4, 8),
    )


def make_lora(seed=1, rank=4):
    """The tensors of a LoRA file of strength 1 (no alphas), for the attention's projections."""
    random, tensors = torch.Generator().manual_seed(seed), {}
    for name, layer in make_network().named_modules():
        if isinstance(layer, torch.nn.Linear) and name.endswith(ATTENTION):
            down = torch.randn(rank, layer.in_features, generator=random)
            up = torch.randn(layer.out_features, rank, generator=random)
            tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    return tensors


def with_lora(seed=1):
    """The network with the LoRA loaded as adapter "a"."""
    network = make_network()
    network.load_lora_adapter(make_lora(seed), **LORA_OF)
    return network


@torch.no_grad()
def predict(network, **more):
    """The network's output for one fixed input."""
    random = torch.Generator().manual_seed(2)
    return network(
        hidden_states=torch.randn(1, 16, 4, generator=random),
        encoder_hidden_states=torch.randn(1, 5, 16, generator=random),
        pooled_projections=torch.randn(1, 8, generator=random),
        timestep=torch.tensor([0.9]),
        img_ids=torch.zeros(16, 3),
        txt_ids=torch.zeros(5, 3),
        **more,
    ).sample


def apart(one, other):
    """The largest difference of two tensors' elements."""
    return (one - other).abs().max().item()
