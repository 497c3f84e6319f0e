"""A model's preprocessing of images that are tensors: differentiable, as a reward needs it."""

from collections.abc import Callable

import torch.nn.functional as F
from open_clip.transform import PreprocessCfg
from torch import Tensor
from torchvision.transforms.functional import InterpolationMode, center_crop, resize


def on_tensors(config: PreprocessCfg) -> Callable[[Tensor], Tensor]:
    """`image_transform_v2(config, is_train=False)` of images (B, 3, H, W) in [0, 1].

    Resized with antialiasing as PIL does, but for its rounding to whole grey levels; "longest" is
    padded with black, "shortest" cropped at the centre.
    """
    size = config.size
    height, width = (size, size) if isinstance(size, int) else size

    def prepare(images: Tensor) -> Tensor:
        h, w = images.shape[-2:]
        ratios = height / h, width / w
        scale = max(ratios) if config.resize_mode == "shortest" else min(ratios)
        whole = int if config.resize_mode == "shortest" else round  # as torchvision, open_clip
        sides = [whole(h * scale), whole(w * scale)]
        if config.resize_mode == "squash":
            sides = [height, width]
        mode = InterpolationMode(config.interpolation)
        # A bicubic filter overshoots, which a picture's grey levels cut off.
        resized = resize(images, sides, mode, antialias=True).clamp(0, 1)
        top, left = max(height - sides[0], 0), max(width - sides[1], 0)
        around = [left // 2, left - left // 2, top // 2, top - top // 2]
        cropped = center_crop(F.pad(resized, around), [height, width])
        # Not by torchvision, which asks the device whether a std is 0: the host would wait.
        mean, std = (images.new_tensor(x).view(3, 1, 1) for x in (config.mean, config.std))
        normalised: Tensor = (cropped - mean) / std
        return normalised

    return prepare
