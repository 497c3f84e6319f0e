"""Prompts as a user's turn to Qwen3, against transformers' own loading, template and states."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from teacher_parts import built, sharded
from text_parts import QWEN_LENGTH, QWEN_TURN, qwen3_text, qwen_tokenizer
from transformers import AutoTokenizer, Qwen3ForCausalLM, Qwen3Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from senseflow.teachers.chat import Chat, num_tokens, require_chat
from senseflow.teachers.text_encoders import (
    QWEN3,
    keep_recording,
    kind_of,
    text_encoder,
)
from senseflow.teachers.text_encoders import (
    qwen_tokenizer as for_plans,
)

PROMPTS = ["a red seven", "two", "a very long prompt of which the end is not read"]
LAYERS = 4
CLASSES = {"Qwen3ForCausalLM": Qwen3ForCausalLM, "Qwen3Model": Qwen3Model}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder for each class, with the tokenizer beside them."""
    folder = tmp_path_factory.mktemp("qwen3")
    tokenizer = qwen_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name in CLASSES:
            head = name == "Qwen3ForCausalLM"
            qwen3_text(tokenizer, LAYERS, head).save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("thinking", [False, True])
def test_states_and_mask_are_transformers_own(folder, name, dtype, thinking):
    """Bit for bit, sharded as in a run, each prompt alone and cut where it is too long."""
    chat = Chat(thinking, (1, -2))
    network = sharded(dtype)(text_encoder(folder / name, kind(folder, name), DTYPES[dtype]))
    states, mask = chat.encode(
        keep_recording(network), tokenizer_of(folder), PROMPTS, length=QWEN_LENGTH
    )
    theirs = CLASSES[name].from_pretrained(folder / name, dtype=DTYPES[dtype])
    assert states.dtype == DTYPES[dtype] and states.shape == (3, QWEN_LENGTH, 32)
    for row, (prompt, mine) in enumerate(zip(PROMPTS, states, strict=True)):
        tokens = tokenizer_of(folder).apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            enable_thinking=thinking,
            padding="max_length",
            truncation=True,
            max_length=QWEN_LENGTH,
            return_tensors="pt",
            return_dict=True,
        )
        with torch.no_grad():
            found = theirs(**tokens, output_hidden_states=True).hidden_states
        expected = torch.cat([found[1], found[-2]], dim=-1)[0]
        seen = tokens["attention_mask"][0].bool()
        assert torch.equal(mask[row], seen)
        close = dict(rtol=1e-5, atol=1e-6) if dtype == "float32" else dict(rtol=0.05, atol=0.05)
        torch.testing.assert_close(mine[seen], expected[seen], **close)
    assert mask.sum(dim=1).tolist()[2] == QWEN_LENGTH
    assert int(mask[1].sum()) == QWEN_TURN + len("two") - (6 if thinking else 0)


def kind(folder, name):
    return kind_of(folder / name, name, QWEN3)


def tokenizer_of(folder):
    return AutoTokenizer.from_pretrained(folder / "tokenizer")


@pytest.mark.parametrize("name", CLASSES)
def test_all_buffers_and_weights_but_the_head_are_read(folder, name):
    source = text_encoder(folder / name, kind(folder, name), torch.bfloat16)
    assert [type(block) for block in source.blocks] == [Qwen3DecoderLayer] * LAYERS
    assert all(p.is_meta and not p.requires_grad for p in source.network.parameters())
    ours = built(source)
    theirs = CLASSES[name].from_pretrained(folder / name, dtype=torch.bfloat16)
    expected = dict(theirs.named_parameters()) | dict(theirs.named_buffers())
    expected.pop("lm_head.weight", None)
    found = dict(ours.named_parameters()) | dict(ours.named_buffers())
    assert found.keys() == expected.keys()
    assert {k: v.dtype for k, v in found.items()} == {k: v.dtype for k, v in expected.items()}
    assert [k for k in found if not torch.equal(found[k], expected[k])] == []


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("tied", [True, False])
def test_either_class_reads_the_files_of_the_other(folder, name, tied, tmp_path):
    """The Hub's language model in a folder whose index says Qwen3Model, and the other way."""
    other = next(key for key in CLASSES if key != name)
    tokenizer = tokenizer_of(folder)
    saved = qwen3_text(tokenizer, LAYERS, head=other == "Qwen3ForCausalLM", tied=tied)
    saved.save_pretrained(tmp_path)
    ours = built(text_encoder(tmp_path, kind(folder, name), torch.float32)).state_dict()
    theirs = {k.removeprefix("model."): v for k, v in saved.state_dict().items()}
    theirs.pop("lm_head.weight", None)
    assert {k.removeprefix("model.") for k in ours} == theirs.keys()
    assert all(torch.equal(v, theirs[k.removeprefix("model.")]) for k, v in ours.items())


def test_a_missing_layer_is_named(folder, tmp_path):
    shutil.copytree(folder / "Qwen3Model", tmp_path / "text_encoder")
    file = tmp_path / "text_encoder" / "model.safetensors"
    state = {k: v for k, v in load_file(file).items() if "layers.2.mlp" not in k}
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"text_encoder.* 3 missing \(.*layers.2.mlp.down_proj"):
        text_encoder(tmp_path / "text_encoder", QWEN3[1], torch.float32)


def test_shapes_are_asked_of_an_encoder_without_numbers(folder):
    source = text_encoder(folder / "Qwen3Model", QWEN3[1], torch.float32)
    states, mask = Chat(False, (1, 2)).encode(source.network, tokenizer_of(folder), ["a"], 20)
    assert states.is_meta and states.shape == (1, 20, 32) and mask.shape == (1, 20)


def test_tokenizers_without_a_template_or_its_marks_are_named(folder, tmp_path):
    require_chat(folder / "tokenizer")
    for_plans(32).save_pretrained(tmp_path / "plan")
    require_chat(tmp_path / "plan")
    shutil.copytree(folder / "tokenizer", tmp_path / "plain")
    (tmp_path / "plain" / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="plain has no chat template"):
        require_chat(tmp_path / "plain")
    shutil.copytree(folder / "tokenizer", tmp_path / "other")
    for file in (tmp_path / "other").glob("*.json"):
        file.write_text(file.read_text().replace("<|im_end|>", "<|end|>"))
    with pytest.raises(ValueError, match=r"other does not know <\|im_end\|>, which its chat"):
        require_chat(tmp_path / "other")


def test_a_template_within_the_tokenizers_config(folder, tmp_path):
    """As the folders of the Hub have it."""
    shutil.copytree(folder / "tokenizer", tmp_path / "tokenizer")
    file = tmp_path / "tokenizer" / "chat_template.jinja"
    template = file.read_text()
    file.unlink()
    config = tmp_path / "tokenizer" / "tokenizer_config.json"
    tree = {**json.loads(config.read_text()), "chat_template": template}
    config.write_text(json.dumps(tree))
    require_chat(tmp_path / "tokenizer")
    chat = Chat(False, (0,))
    assert chat.worded(AutoTokenizer.from_pretrained(tmp_path / "tokenizer"), ["a b"]) == [
        "<|im_start|>user\na b<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    ]


def test_the_head_of_a_template_is_read_once_however_many_prompts(folder):
    tokenizer, read = tokenizer_of(folder), []

    def spy(texts, **rest):
        read.append(texts)
        return tokenizer(texts, **rest)

    chat = Chat(False, (-1,), template="<|im_start|>a{}<|im_end|>")
    assert num_tokens(spy, ["one", "", "seven"], chat) == [4, 1, 6]
    assert num_tokens(spy, ["one", "seven"], None) == [3, 5]
    assert len(read) == 2 + 1
