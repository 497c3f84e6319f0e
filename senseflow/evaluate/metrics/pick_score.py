"""PickScore (Kirstain et al. 2023): a CLIP-H tuned to preferences, in transformers' format."""

from pathlib import Path
from typing import TYPE_CHECKING

from senseflow.common.quiet import quiet
from senseflow.evaluate.metrics import metric

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

    with metric.reading(folder), quiet("transformers"):
        model, told = CLIPModel.from_pretrained(
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
    model = model.to(machine.device).eval()

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
        scale: Tensor = model.logit_scale.float().exp()  # 100 in the published weights
        return scale * F.cosine_similarity(image, text)

    side = images.crop_size["height"] if images.do_center_crop else "whole"
    words = f"the processor of {processor.name}: {images.size}, crop {side}, PIL"
    return metric.Judge(words, load, score, metric.reads_of(tokenizer, length))


SPEC = metric.Spec(
    metric.Column("pick_score", "PickScore", digits=2),
    about="exp(logit_scale) times the cosine: 100 cos",
    needs="prompts",
    prepare=prepare,
    flags=(MODEL, PROCESSOR),
)
