#!/bin/sh
# One step of FlowMatchEulerDiscreteScheduler with shift_terminal, as Qwen-Image's published config
# has it, is NaN: the only sigma is 1, and how much its distance to 1 is stretched is 0 / 0. So
# QwenImagePipeline(prompt, num_inference_steps=1) decodes NaN: a black image.
#
# Seen with diffusers 0.42.1: sigmas are [nan, 0] for 1 step, and [1, .02, 0] for 2.
set -eu
packages="torch==2.15.0 diffusers==0.42.1"
. "$(dirname "$0")/environment"
OMP_NUM_THREADS=1 "$python" - <<'PYTHON'
import diffusers
import numpy as np
from diffusers import FlowMatchEulerDiscreteScheduler

print("diffusers %s" % diffusers.__version__)
assert diffusers.__version__ == "0.42.1", "another version than the pinned one"

scheduler = FlowMatchEulerDiscreteScheduler(
    use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, base_image_seq_len=256,
    max_image_seq_len=8192, shift_terminal=0.02,
)
for num in (1, 2):
    # as QwenImagePipeline asks at 1024 x 1024 (4096 tokens)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / num, num), mu=0.5 + 0.4 * 3840 / 7936)
    print(num, scheduler.sigmas.tolist())
    assert scheduler.sigmas[0].isnan() == (num == 1)
PYTHON
