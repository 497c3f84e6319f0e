"""Text encoders built on the meta device against transformers' own loading of the same folders."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from teacher_parts import CPU, PROMPTS, built, changed_copy, settings_of, sharded
from torch.distributed.tensor import DTensor
from transformers import CLIPTextModelWithProjection, T5EncoderModel
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.models.t5.modeling_t5 import T5Block

from senseflow.common.files import ROOT
from senseflow.teachers.flux.family import FLUX
from senseflow.teachers.sd35.family import SD35, SD35_LARGE
from senseflow.teachers.sdxl.family import SDXL
from senseflow.teachers.text_encoders import (
    CLIP,
    PROJECTED_CLIP,
    T5,
    kind_of,
    text_encoder,
    text_encoders,
)

TINY = ROOT / "assets" / "tiny"
FOLDERS = {
    "flux_folder": (FLUX, FluxPipeline, 12),
    "sd35_folder": (SD35, StableDiffusion3Pipeline, 12),
    "sd35_large_folder": (SD35_LARGE, StableDiffusion3Pipeline, 12),
    "sdxl_folder": (SDXL, StableDiffusionXLPipeline, None),
    "flux": (FLUX, FluxPipeline, 16),
    "sd35_medium": (SD35, StableDiffusion3Pipeline, 16),
    "sd35_large": (SD35_LARGE, StableDiffusion3Pipeline, 16),
    "sdxl": (SDXL, StableDiffusionXLPipeline, None),
}
KINDS = (CLIP, PROJECTED_CLIP, T5)
ASKED = [*PROMPTS, "a red seven left of a blue two " * 20]  # the last of which is cut
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def encodings(family, pipeline, length) -> list[torch.Tensor]:
    """Embeddings and pooled of the pipeline's own call."""
    if family is FLUX:
        return list(pipeline.encode_prompt(ASKED, max_sequence_length=length)[:2])
    rest = {} if length is None else {"max_sequence_length": length}
    given = [ASKED] if length is None else [ASKED, None, None]
    return list(pipeline.encode_prompt(*given, do_classifier_free_guidance=False, **rest)[:3:2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FOLDERS)
def test_prompts_are_encoded_bit_for_bit_as_by_the_pipeline_itself(request, name, dtype):
    family, pipeline_class, length = FOLDERS[name]
    folder = request.getfixturevalue(name) if "folder" in name else TINY / name / "pipeline"
    theirs = pipeline_class.from_pretrained(
        folder, **{family.component: None}, dtype=DTYPES[dtype], local_files_only=True
    )
    settings = settings_of(folder, length=length, compute_dtype=DTYPES[dtype])
    adapter = family.load_adapter(settings, CPU, sharded(dtype))
    ours = adapter.encode_prompts(ASKED)
    with torch.no_grad():
        expected = encodings(family, theirs, length)
    for mine, other in zip((ours.prompt_embeds, ours.pooled), expected, strict=True):
        assert mine.dtype == other.dtype == DTYPES[dtype]
        assert torch.equal(mine, other)
    encoders = {k: v for k, v in theirs.components.items() if k.startswith("text_encoder")}
    assert encoders
    for key, encoder in encoders.items():
        mine = getattr(adapter.pipeline, key)
        assert all(isinstance(p, DTensor) and not p.requires_grad for p in mine.parameters())
        assert not mine.training
        for buffer, other in encoder.named_buffers():
            assert torch.equal(mine.get_buffer(buffer), other)


def test_a_unit_of_sharding_per_layer(sd35_folder):
    sources = text_encoders(sd35_folder, KINDS, torch.bfloat16)
    kinds = {name: [type(block) for block in source.blocks] for name, source in sources.items()}
    assert kinds == {
        "text_encoder": [CLIPEncoderLayer] * 3,
        "text_encoder_2": [CLIPEncoderLayer] * 3,
        "text_encoder_3": [T5Block],
    }
    for source in sources.values():
        assert all(p.is_meta and p.dtype == torch.bfloat16 for p in source.network.parameters())


CLASSES = {
    "text_encoder": CLIPTextModelWithProjection,
    "text_encoder_2": CLIPTextModelWithProjection,
    "text_encoder_3": T5EncoderModel,
}


def rewritten(folder: Path, part: str, target: Path, change) -> Path:
    """A copy of one encoder's folder with other weights."""
    shutil.copytree(folder / part, target)
    file = target / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return target


def as_published(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The names of CLIP in files on the hub: under text_model, and positions stand among them."""
    bare = {key.removeprefix("text_model."): value for key, value in state.items()}
    named = {k if k.startswith("text_proj") else f"text_model.{k}": v for k, v in bare.items()}
    return named | {"text_model.embeddings.position_ids": torch.full((1, 77), 5)}


def under_the_other_name(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """T5's token embedding under the name that it is tied to."""
    return {k.replace("shared.", "encoder.embed_tokens."): v for k, v in state.items()}


def with_a_decoder(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """T5's whole checkpoint holds more than the encoder."""
    both = state | under_the_other_name(state)
    return {k: v.clone() for k, v in both.items()} | {"decoder.final.weight": torch.ones(3)}


@pytest.mark.parametrize(
    ("fixture", "part", "encoder", "change"),
    [
        ("flux_folder", "text_encoder", CLIP, as_published),
        ("sd35_folder", "text_encoder_2", PROJECTED_CLIP, as_published),
        ("sd35_folder", "text_encoder_3", T5, under_the_other_name),
        ("sd35_folder", "text_encoder_3", T5, with_a_decoder),
    ],
)
def test_the_names_of_published_files(request, tmp_path, fixture, part, encoder, change):
    folder = rewritten(request.getfixturevalue(fixture), part, tmp_path / part, change)
    theirs = encoder.network.from_pretrained(folder, dtype=torch.float32)
    ours = built(text_encoder(folder, encoder, torch.float32))
    expected = theirs.state_dict() | dict(theirs.named_buffers())
    found = ours.state_dict() | dict(ours.named_buffers())
    assert found.keys() == expected.keys()
    assert [k for k in found if not torch.equal(found[k], expected[k])] == []


def test_t5_in_two_files(sd35_folder, tmp_path):
    folder = tmp_path / "text_encoder_3"
    theirs = T5EncoderModel.from_pretrained(sd35_folder / "text_encoder_3")
    theirs.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    ours = built(text_encoder(folder, T5, torch.float32)).state_dict()
    assert all(torch.equal(ours[k], v) for k, v in theirs.state_dict().items())


def test_a_missing_encoder_stays_away(sd35_folder, tmp_path):
    """SD3.5 without T5 says null in its model_index.json."""
    changes = {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    folder = changed_copy(sd35_folder, tmp_path / "pipeline", "model_index.json", **changes)
    assert list(text_encoders(folder, KINDS, torch.float32)) == ["text_encoder", "text_encoder_2"]


def without_a_layer(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v for k, v in state.items() if "layers.1.mlp" not in k}


def with_a_longer_table(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    key = next(k for k in state if k.endswith("position_embedding.weight"))
    return state | {key: torch.ones(78, state[key].shape[1])}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without_a_layer, r"4 missing \(.*layers.1.mlp.fc1.bias"),
        (with_a_longer_table, r"1 of another shape \(.*position_embedding.weight"),
    ],
)
def test_weights_that_do_not_fit_are_named(sd35_folder, tmp_path, change, words):
    folder = rewritten(sd35_folder, "text_encoder", tmp_path / "text_encoder", change)
    with pytest.raises(ValueError, match=f"{folder}.* {words}"):
        text_encoder(folder, PROJECTED_CLIP, torch.float32)


def test_folders_that_hold_something_else_are_named(sd35_folder, tmp_path):
    with pytest.raises(
        ValueError, match="text_encoder holds a BertModel, not one of CLIPTextModel, T5"
    ):
        kind_of(sd35_folder / "text_encoder", "BertModel", [CLIP, T5])
    folder = tmp_path / "half"
    shutil.copytree(sd35_folder / "text_encoder", folder)
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    with pytest.raises(ValueError, match=f"no .*model.safetensors .or its index. in {folder}"):
        text_encoder(folder, PROJECTED_CLIP, torch.float32)
    (folder / "config.json").write_text(json.dumps([]))
    with pytest.raises(ValueError, match=r"half/config.json holds no JSON object"):
        text_encoder(folder, PROJECTED_CLIP, torch.float32)
