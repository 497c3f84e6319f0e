"""The embedded reward: a small CLIP that scores a picture by its caption, in PickScore's format.

It is to the tiny recipes what a preference model is to the full-size ones: `reward.models` names
it as `pick_score` and `reward.files` its folder. It learns that a picture with all six attributes
right scores above one with an attribute wrong. It shares no weights with the judge, which measures
what comes of training for it, nor with the discriminator's networks.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    CLIPVisionConfig,
)

from senseflow.tiny.backbone import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Pretext,
    normalise,
    wave_positions,
)
from senseflow.tiny.captions import (
    ATTRIBUTES,
    BACKGROUNDS,
    CLASSES,
    COLOURS,
    NUM_CLASSES,
    captions_of,
    split_scenes,
)
from senseflow.tiny.fitting import fit
from senseflow.tiny.judge import augment, cross_entropy
from senseflow.tiny.pictures import SIZE, draw_scenes, render
from senseflow.tiny.text import WIDTH, clip_config, new_clip_tokenizer

PATCH, DEPTH = 8, 4
NUM_SCENES, NUM_ALTERED = 16, 3  # of a batch, and of each of its scenes
LEARNING_RATE = 2e-3
TEXT_WIDTH = 32
# How often an attribute is the one that is wrong: digits are the hardest to read.
_CHOICES = torch.tensor([3.0 if name.startswith("digit") else 1.0 for name in ATTRIBUTES])
_COLOURS = ATTRIBUTES.index("colour_a"), ATTRIBUTES.index("colour_b")
EASY_SHARE = 6  # one iteration of so many, the first


def new_reward(tokenizer: CLIPTokenizer) -> CLIPModel:
    """An untrained CLIP of 0.17 M parameters for pictures of 32 px and captions."""
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PATCH,
        projection_dim=WIDTH,
    )
    text = clip_config(tokenizer, TEXT_WIDTH)
    text.projection_dim = WIDTH
    reward = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))
    reward.vision_model.embeddings.position_embedding.weight.data.copy_(
        wave_positions(SIZE // PATCH)[0]
    )
    return reward


def altered(scenes: Tensor, attribute: Tensor, generator: torch.Generator) -> Tensor:
    """Scenes (B, 6), each with one attribute wrong, whose place is given (B,)."""
    rows, num = torch.arange(len(scenes)), torch.tensor(list(NUM_CLASSES.values()))[attribute]
    wrong, bad = scenes.clone(), torch.ones(len(scenes), dtype=torch.bool)
    while bad.any():  # two digits of one colour are no scene
        step = 1 + (torch.rand(len(scenes), generator=generator) * (num - 1)).long()
        drawn = (scenes[rows, attribute] + step) % num
        wrong[rows, attribute] = torch.where(bad, drawn, wrong[rows, attribute])
        bad = wrong[:, _COLOURS[0]] == wrong[:, _COLOURS[1]]
    return wrong


def draw_relatives(pool: Tensor, generator: torch.Generator) -> Tensor:
    """Scenes (B, 6) of `pool`, and of each some with one attribute wrong, never the same one."""
    scenes = draw_scenes(pool, NUM_SCENES, generator)
    choices = _CHOICES.expand(NUM_SCENES, -1)
    wrong = torch.multinomial(choices, NUM_ALTERED, generator=generator)
    return torch.cat([scenes, *(altered(scenes, which, generator) for which in wrong.unbind(1))])


def easy_scenes(scenes: Tensor) -> Tensor:
    """Those of scenes (N, 6) in red and blue on white: their ink is what is dark in green.

    A patch is read by a linear map first, which sees digits of one polarity at once; of all colours
    on all backgrounds the network learns no digit for a thousand iterations.
    """
    colours = torch.tensor([COLOURS.index("red"), COLOURS.index("blue")])
    in_colour = torch.isin(scenes[:, _COLOURS], colours).all(1)
    on_white = scenes[:, ATTRIBUTES.index("background")] == BACKGROUNDS.index("white")
    return scenes[in_colour & on_white]


def text_of(reward: CLIPModel, tokenizer: CLIPTokenizer, scenes: Tensor) -> Tensor:
    """Unit vectors (B, 64) of the captions of scenes (B, 6)."""
    ids = tokenizer(captions_of(scenes), padding=True, return_tensors="pt")
    return F.normalize(reward.get_text_features(**ids).pooler_output, dim=1)


def train_reward(iterations: int, seed: int, folder: Path) -> dict[str, float]:
    """Train a CLIP and write it to `folder` with its tokenizer and processor.

    L = the symmetric contrast of pictures and captions, among which each has some that differ in
    one attribute, and what teaches the ViT of `dinov2` to read: cross-entropies of the attributes
    and, from the patches, of the digits, by heads that are thrown away.
    """
    torch.manual_seed(seed)
    generator, scenes = torch.Generator().manual_seed(seed), split_scenes()[0]
    easy, num_easy = easy_scenes(scenes), iterations // EASY_SHARE
    tokenizer = new_clip_tokenizer()
    reward, heads = new_reward(tokenizer), Pretext()

    def loss_of(iteration: int) -> Tensor:
        chosen = draw_relatives(easy if iteration < num_easy else scenes, generator)
        pixels = normalise(augment(render(chosen, generator), generator))
        seen = reward.vision_model(pixel_values=pixels)
        images = F.normalize(reward.visual_projection(seen.pooler_output), dim=1)
        logits = reward.logit_scale.exp() * images @ text_of(reward, tokenizer, chosen).T
        labels = torch.arange(len(logits))
        contrast = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
        reading = cross_entropy(heads.logits(seen.pooler_output), chosen)
        return contrast + reading + heads.patch_loss(seen.last_hidden_state[:, 1:], chosen)

    networks: list[nn.Module] = [reward, heads]
    _, loss = fit(loss_of, networks, iterations, LEARNING_RATE, "reward")
    reward.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=list(IMAGENET_MEAN),
        image_std=list(IMAGENET_STD),
    ).save_pretrained(folder)
    generator.manual_seed(seed + 1)
    return {"loss": loss} | right_above_wrong(reward, tokenizer, 2000, generator)


@torch.no_grad()
def right_above_wrong(
    reward: CLIPModel, tokenizer: CLIPTokenizer, num: int, generator: torch.Generator
) -> dict[str, float]:
    """How often a picture of a caption scores above one with an attribute wrong, by attribute.

    Of `num` held-out scenes with one wrong picture for each of the six, all of held-out scans;
    `all`: above all six of them.
    """
    scenes = draw_scenes(split_scenes()[1], num, generator)
    text = text_of(reward, tokenizer, scenes)

    def score(drawn: Tensor) -> Tensor:
        pixels = normalise(render(drawn, generator, held_out_scans=True))
        parts = [reward.get_image_features(p).pooler_output for p in pixels.split(250)]
        return F.cosine_similarity(torch.cat(parts), text)

    right, above = score(scenes), {}
    for place, name in enumerate(CLASSES):
        wrong = score(altered(scenes, torch.full((num,), place), generator))
        above[name] = right > wrong
    above["all"] = torch.stack([*above.values()]).all(0)
    return {name: found.double().mean().item() for name, found in above.items()}
