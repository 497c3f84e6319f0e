"""What Qwen-Image's VAE says of its latents: a mean and a deviation of each channel. Light."""

from math import inf
from pathlib import Path
from typing import Any

from senseflow.common.fields import short
from senseflow.common.files import read_json
from senseflow.teachers.folder import latent_channels

CHANNELS = 16  # of which diffusers' class has statistics of its own


def require_statistics(base: Path) -> None:
    """Raise ValueError for a VAE without a mean and a deviation of each channel of its latents."""
    file, num = base / "vae" / "config.json", latent_channels(base)
    config = read_json(file)
    for name, least, said in (("latents_mean", -inf, ""), ("latents_std", 0, " above 0")):
        if name not in config and num == CHANNELS:
            continue
        values: Any = config.get(name)
        whole = isinstance(values, list) and len(values) == num
        if not whole or not all(isinstance(v, int | float) and least < v < inf for v in values):
            raise ValueError(
                f"{file}: {name} is {short(values)}, and must be {num} numbers{said}, one for each "
                "channel of the latents"
            )
