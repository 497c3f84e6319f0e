"""The head of LAION's aesthetic predictor and of ImageReward: five linear layers, with dropouts
between them in training and no activation."""

from itertools import pairwise

from torch import nn

PLACES = (0, 2, 4, 6, 7)  # of the layers, as their files number them; the dropouts have the others
WIDTHS = (1024, 128, 64, 16, 1)  # that they give


def linear_head(width: int) -> nn.Sequential:
    """The layers that read features (B, width) and give (B, 1), by their files' keys."""
    widths = pairwise((width, *WIDTHS))
    layers = {place: nn.Linear(*pair) for place, pair in zip(PLACES, widths, strict=True)}
    return nn.Sequential(*(layers.get(i, nn.Identity()) for i in range(PLACES[-1] + 1)))
