"""ImageReward (Xu et al. 2023): a BERT that attends to the image, an MLP on its first token.

The published network is a ViT-L/16 and a BERT with cross-attention. Both exist in timm and in
transformers under the same keys, so the published file loads into them as it is.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from senseflow.common.files import read_json
from senseflow.distill.scorers import metric

if TYPE_CHECKING:
    from torch import Tensor, nn

FOLDER = metric.Flag[Path](
    "--image_reward", "folder", "THUDM/ImageReward: ImageReward.pt, med_config.json", required=True
)
BERT = metric.Flag[Path](
    "--image_reward_tokenizer", "folder", "the tokenizer of bert-base-uncased", required=True
)
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the raw rewards, as published
TEXT_LENGTH = 35
HEAD_WIDTH = 64
VISION = "blip.visual_encoder."
CONFIG = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "max_position_embeddings", "layer_norm_eps", "hidden_act",
)  # fmt: skip
UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")


def prepare(given: metric.Given) -> metric.Prepared:
    """Raises ValueError saying which of the published files are not there."""
    folder, tokenizer = given[FOLDER], given[BERT]
    weights, config = folder / "ImageReward.pt", folder / "med_config.json"
    for file in (weights, config):
        if not file.is_file():
            raise ValueError(f"{file} is missing: {FOLDER.name} takes {FOLDER.help}")
    settings = {
        "text_length": TEXT_LENGTH,
        "config": metric.digest_of(folder, [config.name]),
        "tokenizer": metric.digest_of(tokenizer, metric.TOKENIZER),
    }
    return metric.Prepared(
        "ImageReward: BLIP ViT-L/16 and BERT, MLP", [weights], settings,
        lambda machine: open_reward(weights, config, tokenizer, machine),
    )  # fmt: skip


def open_reward(weights: Path, config: Path, folder: Path, machine: metric.Machine) -> metric.Judge:
    """The scorer; raises ValueError for files of another model."""
    from open_clip.transform import PreprocessCfg, image_transform_v2
    from transformers import AutoTokenizer

    from senseflow.distill.scorers.open_clips import in_words
    from senseflow.distill.scorers.pixels import on_tensors

    network = load_reward(weights, config).to(machine.device, machine.dtype)
    with metric.reading(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    side, _ = network["blip"]["visual_encoder"].patch_embed.img_size
    preprocess = PreprocessCfg(size=side)
    transform = image_transform_v2(preprocess, is_train=False)

    def score(pixels: "Tensor", prompts: list[str]) -> "Tensor":
        tokens = tokenizer(
            prompts, padding="max_length", truncation=True, max_length=TEXT_LENGTH,
            return_tensors="pt",
        ).to(machine.device)  # fmt: skip
        pixels = pixels.to(machine.device, machine.dtype)
        return rewards(network, pixels, tokens.input_ids, tokens.attention_mask)

    return metric.Judge(
        in_words(preprocess) + f"; text of {TEXT_LENGTH} tokens",
        transform,
        score,
        metric.reads_of(tokenizer, TEXT_LENGTH),
        on_tensors(preprocess),
        network,
    )


def load_reward(weights: Path, config: Path) -> Any:
    """The network with the published file's weights; raises ValueError for another model's."""
    state = metric.read_tensors(weights)
    if not {VISION + "patch_embed.proj.weight", VISION + "pos_embed"} <= state.keys():
        raise ValueError(f"{weights} holds weights of another model than ImageReward")
    try:
        told = read_json(config)
        sizes = {name: told[name] for name in CONFIG}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{config} is not ImageReward's med_config.json: {error!r}") from error
    network = build(state, sizes)
    metric.fill(
        lambda: network.load_state_dict(state, strict=False),
        network, weights, "ImageReward", UNUSED,
    )  # fmt: skip
    return network.eval().requires_grad_(False)


def build(state: "dict[str, Tensor]", text_sizes: dict[str, Any]) -> "nn.ModuleDict":
    """The network, named so that its keys are the published file's; sizes come from the weights."""
    from timm.models.vision_transformer import VisionTransformer
    from torch import nn
    from transformers import BlipTextConfig
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    from senseflow.distill.scorers.linear_head import linear_head

    seen = {k.removeprefix(VISION): v for k, v in state.items() if k.startswith(VISION)}
    width, _, _, patch = seen["patch_embed.proj.weight"].shape
    vision = VisionTransformer(
        round((seen["pos_embed"].shape[1] - 1) ** 0.5) * patch,  # all positions but CLS's
        patch,
        embed_dim=width,
        depth=len({key.split(".")[1] for key in seen if key.startswith("blocks.")}),
        num_heads=max(width // HEAD_WIDTH, 1),
        num_classes=0,
        global_pool="",
    )
    config = BlipTextConfig(
        **text_sizes, encoder_hidden_size=width, is_decoder=True, pad_token_id=0
    )
    text = BlipTextModel(config, add_pooling_layer=False)
    head = linear_head(config.hidden_size)
    blip = nn.ModuleDict({"visual_encoder": vision, "text_encoder": text})
    return nn.ModuleDict({"blip": blip, "mlp": nn.ModuleDict({"layers": head})})


def rewards(network: Any, pixels: "Tensor", ids: "Tensor", mask: "Tensor") -> "Tensor":
    """Rewards (B,) float32, standardised, of pixels (B, 3, H, W) and tokens (B, 35)."""
    seen = network["blip"]["visual_encoder"](pixels)  # (B, 1 + patches, width)
    read = network["blip"]["text_encoder"](
        input_ids=ids,
        attention_mask=mask,
        encoder_hidden_states=seen,
        encoder_attention_mask=seen.new_ones(seen.shape[:2]).long(),
        is_decoder=False,  # every word sees all others: the text is read, not written
    )
    reward: Tensor = network["mlp"]["layers"](read.last_hidden_state[:, 0])
    return (reward[:, 0].float() - MEAN) / STD


SPEC = metric.Spec(
    metric.Column("image_reward", "ImageReward"),
    about="BLIP and an MLP, (r - 0.1672) / 1.0333",
    needs="prompts",
    prepare=prepare,
    flags=(FOLDER, BERT),
)
