"""ImageReward (Xu et al. 2023): a BERT that attends to the image, an MLP on its first token.

The published network is a ViT-L/16 and a BERT with cross-attention. Both exist in timm and in
transformers under the same keys, so the published file loads into them as it is.
"""

import argparse
import json
from itertools import pairwise
from pathlib import Path

import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import AutoTokenizer, BlipTextConfig
from transformers.models.blip.modeling_blip_text import BlipTextModel

from senseflow.evaluate.metrics.checkpoints import TOKENIZER, digest_of, fill, read_tensors, reading
from senseflow.evaluate.metrics.clip_scores import describe
from senseflow.evaluate.metrics.metric import Machine, Metric, Scorer

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the raw rewards, as published
TEXT_LENGTH = 35
HEAD_WIDTH = 64
FILES = (
    "image_reward needs the folder of THUDM/ImageReward with ImageReward.pt and med_config.json in "
    "--image_reward, and bert-base-uncased's tokenizer in --image_reward_tokenizer"
)
VISION = "blip.visual_encoder."
LINEAR = (0, 2, 4, 6, 7)  # of the MLP's layers; dropouts stand between, and no activation
CONFIG = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "max_position_embeddings", "layer_norm_eps", "hidden_act",
)  # fmt: skip
UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")


class Reward(nn.Module):
    """The network, named so that its keys are the published file's; sizes come from the weights."""

    def __init__(self, state: dict[str, Tensor], text_config: BlipTextConfig) -> None:
        super().__init__()
        seen = {k.removeprefix(VISION): v for k, v in state.items() if k.startswith(VISION)}
        width, _, _, patch = seen["patch_embed.proj.weight"].shape
        depth = len({key.split(".")[1] for key in seen if key.startswith("blocks.")})
        self.side = round((seen["pos_embed"].shape[1] - 1) ** 0.5) * patch
        text_config.encoder_hidden_size = width
        vision = VisionTransformer(
            self.side, patch, embed_dim=width, depth=depth, num_heads=max(width // HEAD_WIDTH, 1),
            num_classes=0, global_pool="",
        )  # fmt: skip
        text = BlipTextModel(text_config, add_pooling_layer=False)
        self.blip = nn.ModuleDict({"visual_encoder": vision, "text_encoder": text})
        widths = pairwise((text_config.hidden_size, 1024, 128, 64, 16, 1))
        layers = {place: nn.Linear(*pair) for place, pair in zip(LINEAR, widths, strict=True)}
        stack = nn.Sequential(*(layers.get(i, nn.Identity()) for i in range(8)))
        self.mlp = nn.ModuleDict({"layers": stack})

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Rewards (B,), standardised, of pixels (B, 3, H, W) and tokens (B, 35)."""
        seen = self.blip["visual_encoder"](pixels)
        read = self.blip["text_encoder"](
            input_ids=ids,
            attention_mask=mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device),
            is_decoder=False,
        )
        reward: Tensor = self.mlp["layers"](read.last_hidden_state[:, 0])
        return (reward[:, 0].float() - MEAN) / STD


def image_reward_metric(args: argparse.Namespace) -> Metric[Scorer]:
    """Mean reward; raises ValueError saying which of the published files are not there."""
    folder, tokenizer = args.image_reward, args.image_reward_tokenizer
    if folder is None or tokenizer is None:
        raise ValueError(FILES)
    weights, config = folder / "ImageReward.pt", folder / "med_config.json"
    for file in (weights, config):
        if not file.is_file():
            raise ValueError(f"{file} is missing: {FILES}")
    if not tokenizer.is_dir():
        raise ValueError(f"--image_reward_tokenizer {tokenizer} is not a folder: {FILES}")
    settings = {
        "text_length": TEXT_LENGTH,
        "config": digest_of(folder, [config.name]),
        "tokenizer": digest_of(tokenizer, TOKENIZER),
    }
    return Metric(
        "image_reward", "ImageReward: BLIP ViT-L/16 and BERT, MLP", [weights], settings,
        lambda m: open_reward(weights, config, tokenizer, m),
    )  # fmt: skip


def load_reward(weights: Path, config: Path) -> Reward:
    """The network with the published file's weights; raises ValueError for another model's."""
    state = read_tensors(weights)
    if not {VISION + "patch_embed.proj.weight", VISION + "pos_embed"} <= state.keys():
        raise ValueError(f"{weights} holds weights of another model than ImageReward")
    try:
        told = json.loads(config.read_text(encoding="utf-8"))
        sizes = {name: told[name] for name in CONFIG}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{config} is not ImageReward's med_config.json: {error!r}") from error
    network = Reward(state, BlipTextConfig(**sizes, is_decoder=True, pad_token_id=0))
    fill(
        lambda: network.load_state_dict(state, strict=False),
        network, weights, "ImageReward", UNUSED,
    )  # fmt: skip
    return network.eval()


def open_reward(weights: Path, config: Path, folder: Path, machine: Machine) -> Scorer:
    """The scorer; raises ValueError for files of another model."""
    network = load_reward(weights, config).to(machine.device, machine.dtype)
    with reading(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    preprocess = PreprocessCfg(size=network.side)
    transform = image_transform_v2(preprocess, is_train=False)

    def score(pixels: Tensor, prompts: list[str]) -> Tensor:
        tokens = tokenizer(
            prompts, padding="max_length", truncation=True, max_length=TEXT_LENGTH,
            return_tensors="pt",
        ).to(machine.device)  # fmt: skip
        pixels = pixels.to(machine.device, machine.dtype)
        rewards: Tensor = network(pixels, tokens.input_ids, tokens.attention_mask)
        return rewards

    return Scorer(describe(preprocess) + f"; text of {TEXT_LENGTH} tokens", transform, score)
