"""PickScore (Kirstain et al. 2023): a CLIP-H tuned to preferences, in transformers' format."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from senseflow.common.quiet import quiet
from senseflow.distill.scorers import metric

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

MODEL = metric.Flag[Path]("--pick_score", "folder", "PickScore_v1", required=True)
PROCESSOR = metric.Flag[Path | None](
    "--pick_processor", "folder", "its processor (default: the same)"
)
PROCESSORS = ("preprocessor_config.json", "processor_config.json")  # the older and the newer name
WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")


def prepare(given: metric.Given) -> metric.Prepared:
    """Raises ValueError for folders without the files of a CLIPModel and its processor."""
    folder, processor = given[MODEL], given[PROCESSOR] or given[MODEL]
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json: it is no folder of transformers")
    if not any((processor / name).is_file() for name in PROCESSORS):
        raise ValueError(
            f"{processor} has no {PROCESSORS[0]}: name a folder with CLIP-H's processor in "
            "--pick_processor"
        )
    weights = metric.weights_in(folder, *WEIGHTS)
    if not weights:
        raise ValueError(f"{folder} has no weights ({' or '.join(WEIGHTS)})")
    settings = {
        "config": metric.digest_of(folder, ["config.json"]),
        "processor": metric.digest_of(processor, [*PROCESSORS, *metric.TOKENIZER]),
    }
    return metric.Prepared(
        "transformers CLIPModel", weights, settings,
        lambda machine: open_pick(folder, processor, machine),
    )  # fmt: skip


def open_pick(folder: Path, processor: Path, machine: metric.Machine) -> metric.Judge:
    """Raises ValueError when the folder's weights are not those of a CLIPModel."""
    import torch.nn.functional as F
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

    class PickScore(CLIPModel):  # type: ignore[misc]
        # bfloat16 has 4.594 for 4.605, by which all scores would be 98.9 times the cosine
        _keep_in_fp32_modules_strict = ("logit_scale",)

    with metric.reading(folder), quiet("transformers"):
        model, told = PickScore.from_pretrained(
            folder, local_files_only=True, dtype=machine.dtype, output_loading_info=True
        )
    misfits = sorted([*told["missing_keys"], *(str(k) for k in told["mismatched_keys"])])
    if misfits:
        raise ValueError(
            f"{folder} holds weights of another model than CLIPModel: {len(misfits)} of its keys "
            f"are missing or have another shape, such as {misfits[0]}"
        )
    with metric.reading(processor):
        # the PIL backend, as in the published scores
        images = AutoImageProcessor.from_pretrained(processor, local_files_only=True, backend="pil")
        tokenizer = AutoTokenizer.from_pretrained(processor, local_files_only=True)
    length = model.config.text_config.max_position_embeddings
    model = model.to(machine.device).eval().requires_grad_(False)

    def load(picture: "Image.Image") -> "Tensor":
        pixels: Tensor = images(images=picture, return_tensors="pt")["pixel_values"][0]
        return pixels

    def score(pixels: "Tensor", prompts: list[str]) -> "Tensor":
        pixels = pixels.to(machine.device, machine.dtype)
        tokens = tokenizer(
            prompts, padding=True, truncation=True, max_length=length, return_tensors="pt"
        ).to(machine.device)
        image = model.get_image_features(pixel_values=pixels).pooler_output.float()
        text = model.get_text_features(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask
        ).pooler_output.float()
        scale: Tensor = model.logit_scale.exp()  # 100 in the published weights
        return scale * F.cosine_similarity(image, text)

    side = images.crop_size["height"] if images.do_center_crop else "whole"
    words = f"the processor of {processor.name}: {images.size}, crop {side}, PIL"
    reads, tensors = metric.reads_of(tokenizer, length), tensors_of(images)
    return metric.Judge(words, load, score, reads, tensors, model)


def tensors_of(processor: Any) -> "Callable[[Tensor], Tensor] | None":
    """What a processor of CLIP's kind does to images in [0, 1]; None for one of another kind."""
    from open_clip.transform import PreprocessCfg

    from senseflow.distill.scorers.pixels import on_tensors

    side, crop = processor.size.get("shortest_edge"), processor.crop_size
    square = processor.do_center_crop and crop and crop["height"] == crop["width"] == side
    if not (square and processor.resample == 3):  # bicubic
        return None
    mean, std = tuple(processor.image_mean), tuple(processor.image_std)
    return on_tensors(PreprocessCfg(size=side, mean=mean, std=std))


SPEC = metric.Spec(
    metric.Column("pick_score", "PickScore", digits=2),
    about="exp(logit_scale) times the cosine: 100 cos",
    needs="prompts",
    prepare=prepare,
    flags=(MODEL, PROCESSOR),
)
