"""Files of rewards that are not there: the published networks' shapes, with holes for weights.

Each kind of file that `reward.files` may name has its writer here; a run's own code reads what it
writes.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import BertTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel

from senseflow.distill.scorers import aesthetic, clip, hps, image_reward, pick_score
from senseflow.distill.scorers.linear_head import linear_head
from senseflow.distill.scorers.metric import Flag, Given
from senseflow.distill.scorers.open_clips import architecture, find_source
from senseflow.engine.rewards import said_of
from senseflow.plan.stand_in import write_holes
from senseflow.teachers.text_encoders import clip_tokenizer

Write = Callable[[Path, Given], None]  # given: what else reward.files says

CLIP_H = CLIPConfig(  # yuvalkirstain/PickScore_v1
    projection_dim=1024,
    text_config={
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
        "num_attention_heads": 16, "hidden_act": "gelu",
    },
    vision_config={
        "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
        "num_attention_heads": 16, "hidden_act": "gelu", "patch_size": 14,
    },
)  # fmt: skip
MED_CONFIG = {  # THUDM/ImageReward
    "vocab_size": 30524, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "intermediate_size": 3072, "max_position_embeddings": 512, "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
}  # fmt: skip
VIT_L_16 = {  # of it, what tells its sizes
    "patch_embed.proj.weight": (1024, 3, 16, 16), "pos_embed": (1, 197, 1024),
    **{f"blocks.{n}.": () for n in range(24)},
}  # fmt: skip


def stand_in_files(files: Sequence[str], folder: Path) -> tuple[str, ...]:
    """`reward.files`, in `folder` what is not where they say; raises ValueError for an architecture
    that nobody knows."""
    folder.mkdir(exist_ok=True)
    pairs = [words.partition("=")[::2] for words in files]
    given, found = Given({f"--{name}": text for name, text in pairs}), []
    flags = {flag.name.removeprefix("--"): flag for flag in WRITERS}
    for (name, text), words in zip(pairs, files, strict=True):
        if name in flags and text and not Path(text).exists():
            target = folder / (f"{name}.safetensors" if flags[name].kind == "file" else name)
            with said_of(f"reward.files {words}"):
                WRITERS[flags[name]](target, given)
            words = f"{name}={target}"
        found.append(words)
    return tuple(found)


def open_clip_file(model: Flag[str]) -> Write:
    """Weights of the open_clip architecture that a flag names."""

    def write(file: Path, given: Given) -> None:
        write_holes(file, on_meta(model, given).state_dict())

    return write


def on_meta(model: Flag[str], given: Given) -> Any:
    """The open_clip architecture that a flag names; raises ValueError for an unknown one."""
    prefix = model.name.removesuffix("_model")
    return architecture(find_source(given[model], Path(prefix), False, prefix), "meta")


def write_pick_score(folder: Path, given: Given) -> None:
    """A CLIPModel with its processor."""
    with torch.device("meta"):
        network = CLIPModel(CLIP_H)
    write_processor(folder, given)
    CLIP_H.save_pretrained(folder)
    # In the type that is computed in: transformers' own threads would convert every byte of a hole.
    write_holes(folder / "model.safetensors", network.to(torch.bfloat16).state_dict())


def write_processor(folder: Path, _: Given) -> None:
    """CLIP-H's: OpenAI's own at 224 pixels, and a tokenizer that knows a letter."""
    CLIPImageProcessor().save_pretrained(folder)
    clip_tokenizer(CLIP_H.text_config.max_position_embeddings).save_pretrained(folder)


def write_image_reward(folder: Path, _: Given) -> None:
    """ImageReward.pt and med_config.json."""
    folder.mkdir()
    (folder / "med_config.json").write_text(json.dumps(MED_CONFIG))
    with torch.device("meta"):
        sizes = {image_reward.VISION + key: torch.empty(size) for key, size in VIT_L_16.items()}
        network = image_reward.build(sizes, MED_CONFIG)
    with torch.serialization.skip_data():  # no bytes are written, nor read of what is empty
        torch.save(network.to_empty(device="cpu").state_dict(), folder / "ImageReward.pt")


def write_bert(folder: Path, _: Given) -> None:
    """BERT's tokenizer that knows a letter."""
    vocab = {
        piece: n for n, piece in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"))
    }
    BertTokenizer(vocab=vocab).save_pretrained(folder)


def write_head(file: Path, given: Given) -> None:
    """The linear head of LAION's aesthetic predictor, on CLIP's features."""
    width = on_meta(aesthetic.MODEL, given).visual.output_dim
    with torch.device("meta"):
        head = linear_head(width)
    write_holes(file, {f"layers.{key}": value for key, value in head.state_dict().items()})


WRITERS: dict[Flag[Any], Write] = {
    clip.WEIGHTS: open_clip_file(clip.MODEL),
    hps.WEIGHTS_2_1: open_clip_file(hps.MODEL),
    hps.WEIGHTS_2: open_clip_file(hps.MODEL),
    pick_score.MODEL: write_pick_score,
    pick_score.PROCESSOR: write_processor,
    image_reward.FOLDER: write_image_reward,
    image_reward.BERT: write_bert,
    aesthetic.HEAD: write_head,
    aesthetic.CLIP: open_clip_file(aesthetic.MODEL),
}
