"""The judge: a small CNN that reads a picture's attributes, and whose features give FID-T.

It is trained on rendered pictures only, and shares nothing with the discriminator's backbone.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from senseflow.evaluate.metrics.frechet import FeatureStatistics, frechet_distance
from senseflow.tiny.captions import ATTRIBUTES, NUM_CLASSES, attributes_of, split_scenes
from senseflow.tiny.fitting import fit
from senseflow.tiny.pictures import draw_scenes, render

BATCH_SIZE = 128
LEARNING_RATE = 3e-3
_CONFIG_FILE, _WEIGHTS_FILE = "config.json", "model.safetensors"


def _block(channels_in: int, channels_out: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(channels_out), nn.ReLU())


class Judge(nn.Module):
    """Reads the six attributes of pictures (B, 3, 32, 32) in [-1, 1]."""

    def __init__(
        self, channels: tuple[int, ...] = (24, 48, 96, 96), num_features: int = 64
    ) -> None:
        super().__init__()
        self.config = {"channels": list(channels), "num_features": num_features}
        first, second, third, fourth = channels
        self.trunk = nn.Sequential(
            _block(3, first, 1),
            _block(first, second, 2),
            _block(second, second, 1),
            _block(second, third, 2),
            _block(third, third, 1),
            _block(third, fourth, 2),
            nn.Flatten(),
            nn.Linear(16 * fourth, num_features),
        )
        self.heads = nn.Linear(num_features, sum(NUM_CLASSES.values()))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """The penultimate features (B, 64) of images."""
        features: torch.Tensor = self.trunk(images)
        return features

    def logits(self, features: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Per attribute, in the order of `ATTRIBUTES`, the logits (B, classes)."""
        logits: torch.Tensor = self.heads(features.relu())
        return torch.split(logits, list(NUM_CLASSES.values()), dim=1)

    @torch.no_grad()
    def features(self, images: torch.Tensor, batch_size: int = 250) -> torch.Tensor:
        """Features (N, 64) of any number of images."""
        return torch.cat([self(chunk) for chunk in images.split(batch_size)])

    @torch.no_grad()
    def attributes(self, images: torch.Tensor) -> torch.Tensor:
        """Attributes (N, 6) read from images."""
        return self.read(self.features(images))

    def read(self, features: torch.Tensor) -> torch.Tensor:
        """Attributes (N, 6) read from features (N, 64)."""
        return torch.stack([logits.argmax(1) for logits in self.logits(features)], 1)

    @torch.no_grad()
    def measure(
        self, images: torch.Tensor, prompts: list[str], references: dict[str, FeatureStatistics]
    ) -> dict[str, float]:
        """Attribute accuracies of images against their prompts, and a distance to each reference.

        `digits`, `colours` are means over both digits; `mean` is over the six attributes; `all`
        counts pictures with all six right; a key of `references` names its Frechet distance.
        """
        features = self.features(images)
        right = (self.read(features) == attributes_of(prompts)).double()
        rates = dict(zip(ATTRIBUTES, right.mean(0).tolist(), strict=True))
        statistics = FeatureStatistics.of(features)
        return rates | {
            "digits": right[:, :2].mean().item(),
            "colours": right[:, 2:4].mean().item(),
            "mean": right.mean().item(),
            "all": right.all(1).double().mean().item(),
            **{key: frechet_distance(statistics, other) for key, other in references.items()},
        }

    def save(self, folder: Path) -> None:
        """Write config.json and model.safetensors."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _CONFIG_FILE).write_text(json.dumps(self.config, indent=2) + "\n")
        save_file(self.state_dict(), folder / _WEIGHTS_FILE)

    @classmethod
    def load(cls, folder: str | Path) -> "Judge":
        """The judge of a folder that `save` wrote, in eval mode, without gradients."""
        config = json.loads((Path(folder) / _CONFIG_FILE).read_text())
        judge = cls(tuple(config["channels"]), config["num_features"])
        judge.load_state_dict(load_file(Path(folder) / _WEIGHTS_FILE))
        return judge.eval().requires_grad_(False)


def diversity(features: torch.Tensor, chosen: torch.Tensor | None = None) -> float:
    """Mean distance between features (prompts, seeds, D) of pictures of one prompt; NaN: no pairs.

    chosen: (prompts, seeds) of bool, which pictures count; None: all.
    """
    if chosen is None:
        chosen = features.new_ones(features.shape[:2], dtype=torch.bool)
    pairs = (chosen[:, :, None] & chosen[:, None]).triu(1)
    return torch.cdist(features, features)[pairs].mean().item()


def cross_entropy(logits: tuple[torch.Tensor, ...], attributes: torch.Tensor) -> torch.Tensor:
    """Mean over the six attributes (B, 6) of the cross-entropy of their logits."""
    pairs = zip(logits, attributes.unbind(1), strict=True)
    return torch.stack([F.cross_entropy(x, y, label_smoothing=0.02) for x, y in pairs]).mean()


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Images with noise of a random strength and, half of them, slightly blurred."""
    strength = 0.15 * torch.rand(len(images), 1, 1, 1, generator=generator)
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    share = torch.rand(len(images), 1, 1, 1, generator=generator).sub(0.5).clamp(min=0)
    noise = torch.randn(images.shape, generator=generator)
    return torch.lerp(images, blurred, share) + strength * noise


def train_judge(iterations: int, seed: int) -> tuple[Judge, dict[str, float]]:
    """A trained judge and its accuracies on held-out scenes made of held-out scans."""
    torch.manual_seed(seed)
    judge, generator = Judge(), torch.Generator().manual_seed(seed)
    scenes, held_out = split_scenes()

    def loss_of(_: int) -> torch.Tensor:
        attributes = draw_scenes(scenes, BATCH_SIZE, generator)
        images = augment(render(attributes, generator), generator)
        return cross_entropy(judge.logits(judge(images)), attributes)

    _, loss = fit(loss_of, [judge], iterations, LEARNING_RATE, "judge")
    generator.manual_seed(seed + 1)
    unseen = draw_scenes(held_out, 2000, generator)
    read = judge.attributes(render(unseen, generator, held_out_scans=True))
    rates = (read == unseen).double().mean(0)
    return judge, {"loss": loss} | dict(zip(ATTRIBUTES, rates.tolist(), strict=True))
