#!/bin/sh
# The backward of torch's pad_sequence copies the whole batch once for each sequence in it, also
# where nothing is padded: each sequence is written into a slice, and the way back through that
# clones the gradient of all. diffusers' Z-Image calls it three times a forward, on pictures,
# captions and both, so that its backward has a part that grows with the square of the batch.
#
# Seen with torch 2.15.0: of B sequences B + 2 - 1 / B times the batch is copied (torch.stack: nothing). With
# diffusers 0.42.1, pictures of 4 x 4 patches and captions of 20 tokens, which it fills to 32 each, the
# backward of its Z-Image transformer copies 52,736 numbers per sample in a batch of 4, 86,528 in 8,
# 152,576 in 16 and 283,904 in 32: nearly twice as many for each doubling.
set -eu
packages="torch==2.15.0 diffusers==0.42.1 transformers==5.23.0 numpy"
. "$(dirname "$0")/environment"
cat > "$folder/seen.py" <<'PYTHON'
import diffusers
import torch
from diffusers import ZImageTransformer2DModel
from torch.nn.utils.rnn import pad_sequence
from torch.utils._python_dispatch import TorchDispatchMode

torch.set_num_threads(1)
torch.manual_seed(0)


class Copies(TorchDispatchMode):
    """Numbers that copy_ and clone write."""

    def __init__(self):
        super().__init__()
        self.num = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.overloadpacket in (torch.ops.aten.copy_, torch.ops.aten.clone):
            self.num += args[0].numel()
        return op(*args, **(kwargs or {}))


def copied(output):
    grad = torch.ones_like(output)
    with Copies() as copies:
        output.backward(grad)
    return copies.num


for join, expected in ((lambda x: pad_sequence(x, batch_first=True), lambda num: num + 2 - 1 / num),
                       (torch.stack, lambda num: 0)):
    for num in (4, 8, 16):
        output = join([torch.randn(32, 64, requires_grad=True) for _ in range(num)])
        found = copied(output) / output.numel()
        print(f"{num} sequences: copied {found} times the batch")
        assert found == expected(num), found

network = ZImageTransformer2DModel(
    in_channels=8, dim=64, n_layers=4, n_refiner_layers=1, n_heads=4, n_kv_heads=4,
    cap_feat_dim=64, axes_dims=[4, 6, 6], axes_lens=[64, 8, 8],
)
each = []
for num in (4, 8, 16, 32):
    frames, captions = torch.randn(num, 8, 1, 8, 8), torch.randn(num, 20, 64)
    times = torch.full((num,), 0.5)
    output = network(list(frames), times, list(captions), return_dict=False)[0]
    each.append(copied(torch.stack(output)) / num)
growth = [b / a for a, b in zip(each, each[1:])]
print(f"torch {torch.__version__}, diffusers {diffusers.__version__}: Z-Image's backward copies")
print("numbers per sample, batches of 4, 8, 16, 32:", [round(e) for e in each], growth)
assert growth[-1] > 1.5, growth
PYTHON
"$python" "$folder/seen.py"
