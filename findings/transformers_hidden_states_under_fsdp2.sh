#!/bin/sh
# transformers looks up what a model can record (hidden states, attentions) under the model's class.
# FSDP2's fully_shard gives a module a new class, so the look-up finds nothing: the forward succeeds
# and `output_hidden_states=True` returns None. It is the class of the module that records that
# matters. CLIP's and Qwen3's models record themselves; in T5's encoder and in Qwen2.5-VL a module
# inside does, and sharding the root leaves it alone.
#
# Seen with torch 2.15.0 and transformers 5.23.0: the states with the blocks sharded, and with the
# root sharded too, of three layers and the embedding:
#   CLIPTextModel 4, None   T5EncoderModel 4, 4   Qwen3Model 4, None
#   Qwen2_5_VLForConditionalGeneration 4, 4
set -eu
packages="torch==2.15.0 transformers==5.23.0"
. "$(dirname "$0")/environment"
OMP_NUM_THREADS=1 "$python" - <<'PYTHON'
import torch
import torch.distributed as dist
import transformers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

versions = torch.__version__.split("+")[0], transformers.__version__
print("torch %s, transformers %s" % versions)
assert versions == ("2.15.0", "5.23.0"), "other versions than the pinned ones"
transformers.logging.set_verbosity_error()
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
ids = torch.tensor([[1, 2, 3, 4]])
size = dict(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=3)
heads = dict(num_attention_heads=2, num_key_value_heads=2)
rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6}
vision = dict(depth=1, hidden_size=16, num_heads=2, intermediate_size=32, out_hidden_size=16)


def clip():
    return CLIPTextModel(CLIPTextConfig(**size, num_attention_heads=2, bos_token_id=1, eos_token_id=4))


def t5():
    return T5EncoderModel(T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=3, num_heads=2))


def qwen3():
    return Qwen3Model(Qwen3Config(**size, **heads, head_dim=8))


def qwen_vl():
    text = dict(**size, **heads, rope_parameters=rope)
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))


def layers(model):
    """The decoder's (or encoder's) blocks: the longest list of modules."""
    return max((m for m in model.modules() if isinstance(m, torch.nn.ModuleList)), key=len)


def count(model):
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
    return None if states is None else len(states)


def sharded(make, root=False):
    """The states that a new model gives with its blocks sharded, and its root too."""
    model = make().eval()
    assert count(model) == 4, "the plain model records"
    for layer in layers(model):
        fully_shard(layer, mesh=mesh)
    if root:
        fully_shard(model, mesh=mesh)
    return count(model)


seen = {make.__name__: [sharded(make), sharded(make, root=True)] for make in (clip, t5, qwen3, qwen_vl)}
for name, row in seen.items():
    print(name, "states with the blocks sharded, and with the root too:", row)
dist.destroy_process_group()
expected = {"clip": [4, None], "t5": [4, 4], "qwen3": [4, None], "qwen_vl": [4, 4]}
assert seen == expected, "the behaviour has changed: %s" % seen
print("as found: the states are gone, and nothing says so")
PYTHON
