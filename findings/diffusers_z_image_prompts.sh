#!/bin/sh
# ZImagePipeline writes into the list of prompts that it is given: in the place of each prompt the
# text of its chat template. Called with the same list once more, as a loop over seeds does, it puts
# the template around the template, and draws another image from the same seed.
#
# Seen with diffusers 0.42.1 and transformers 5.23.0: the list is not what it was, and images of the
# first and the second call differ; of a fresh list each they are the same.
set -eu
packages="torch==2.15.0 diffusers==0.42.1 transformers==5.23.0"
. "$(dirname "$0")/environment"
OMP_NUM_THREADS=1 "$python" - <<'PYTHON'
import string

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline
from diffusers import ZImageTransformer2DModel
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

versions = (diffusers.__version__, transformers.__version__)
print("diffusers %s, transformers %s" % versions)
assert versions == ("0.42.1", "5.23.0"), "other versions than the pinned ones"

torch.manual_seed(0)
marks = ["<|im_start|>", "<|im_end|>"]
pieces = [*string.ascii_lowercase, "Ġ", "Ċ", "<|endoftext|>"]
tokenizer = Qwen2Tokenizer(
    vocab={piece: number for number, piece in enumerate(pieces)},
    additional_special_tokens=marks,
    chat_template="{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
)
text = Qwen3Config(
    vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1, head_dim=8, initializer_range=0.2,
)
pipe = ZImagePipeline(
    scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    vae=AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4,
        shift_factor=0.1,
    ),
    text_encoder=Qwen3Model(text),
    tokenizer=tokenizer,
    transformer=ZImageTransformer2DModel(
        in_channels=4, dim=48, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
        cap_feat_dim=16, axes_dims=[8, 8, 8],
    ),
)
pipe.set_progress_bar_config(disable=True)


def draw(prompts):
    return pipe(
        prompts, height=16, width=16, num_inference_steps=1, guidance_scale=0.0,
        output_type="latent", generator=torch.Generator().manual_seed(0),
    ).images


prompts = ["a red seven"]
first, again = draw(prompts), draw(prompts)
print("after two calls:", prompts)
apart = (first - again).abs().max().item()
fresh = (first - draw(["a red seven"])).abs().max().item()
print("the same list: %.2g apart; a list each: %.2g" % (apart, fresh))
assert prompts[0].count("<|im_start|>user") == 2 and apart > 1e-3 > fresh
PYTHON
