"""PickScore: a fine-tuned CLIP-H in transformers' format."""

import argparse
from pathlib import Path

import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

from senseflow.evaluate.metrics.checkpoints import TOKENIZER, digest_of, reading
from senseflow.evaluate.metrics.metric import Machine, Metric, Scorer

PROCESSORS = ("preprocessor_config.json", "processor_config.json")  # the older and the newer name
WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")


def pick_score_metric(args: argparse.Namespace) -> Metric[Scorer]:
    """exp(logit_scale) times the cosine of image and prompt: 100 cos for the published weights."""
    folder, processor = args.pick_score, args.pick_processor or args.pick_score
    if folder is None:
        raise ValueError("--pick_score is missing: the folder of PickScore's CLIPModel")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json: it is no folder of transformers")
    if not any((processor / name).is_file() for name in PROCESSORS):
        raise ValueError(
            f"{processor} has no {PROCESSORS[0]}: name a folder with CLIP-H's processor in "
            "--pick_processor"
        )
    weights = weights_in(folder)
    return Metric(
        "pick_score",
        "transformers CLIPModel",
        weights,
        {
            "config": digest_of(folder, ["config.json"]),
            "processor": digest_of(processor, [*PROCESSORS, *TOKENIZER]),
        },
        lambda m: open_pick(folder, processor, m),
    )


def weights_in(folder: Path) -> list[Path]:
    """The weights of a transformers folder, whole or in shards; safetensors first."""
    for pattern in WEIGHTS:
        found = sorted(folder.glob(pattern))
        if found:
            return found
    raise ValueError(f"{folder} has no weights ({' or '.join(WEIGHTS)})")


def open_pick(folder: Path, processor: Path, machine: Machine) -> Scorer:
    """Raises ValueError when the folder's weights are not those of a CLIPModel."""
    with reading(folder):
        model, told = CLIPModel.from_pretrained(
            folder, local_files_only=True, dtype=machine.dtype, output_loading_info=True
        )
    misfits = sorted([*told["missing_keys"], *(str(k) for k in told["mismatched_keys"])])
    if misfits:
        raise ValueError(
            f"{folder} holds weights of another model than CLIPModel: {len(misfits)} of its keys "
            f"are missing or have another shape, such as {misfits[0]}"
        )
    with reading(processor):
        # the PIL backend, as in the published scores
        images = AutoImageProcessor.from_pretrained(processor, local_files_only=True, backend="pil")
        tokenizer = AutoTokenizer.from_pretrained(processor, local_files_only=True)
    length = model.config.text_config.max_position_embeddings
    model = model.to(machine.device).eval()

    def load(picture: Image.Image) -> Tensor:
        pixels: Tensor = images(images=picture, return_tensors="pt")["pixel_values"][0]
        return pixels

    def score(pixels: Tensor, prompts: list[str]) -> Tensor:
        pixels = pixels.to(machine.device, machine.dtype)
        tokens = tokenizer(
            prompts, padding=True, truncation=True, max_length=length, return_tensors="pt"
        ).to(machine.device)
        image = model.get_image_features(pixel_values=pixels).pooler_output.float()
        text = model.get_text_features(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask
        ).pooler_output.float()
        scale: Tensor = model.logit_scale.float().exp()
        return scale * F.cosine_similarity(image, text)

    side = images.crop_size["height"] if images.do_center_crop else "whole"
    words = f"the processor of {processor.name}: {images.size}, crop {side}, PIL"
    return Scorer(words, load, score)
