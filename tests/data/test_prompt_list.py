"""Prompts without images: which files they are, their order, what is refused, and their check."""

import csv
import json
import pickle
from itertools import islice
from pathlib import Path

import pytest
from statuses import status_of
from test_check import TINY, checked, found

from senseflow.cache.__main__ import main as cache
from senseflow.config.config import load_config
from senseflow.config.recipes import RECIPES
from senseflow.data.check import __main__ as check
from senseflow.data.dataset import open_dataset
from senseflow.data.items import Position
from senseflow.data.prompt_list import PromptList
from senseflow.data.sampler import Share, batches
from senseflow.engine.inputs import read_run
from senseflow.reconstruction_error.__main__ import main as reconstruction_error

ROWS = [
    {"prompt": "two cats", "count": 2, "of": {"class": "cat"}},
    {"prompt": "a dog", "count": 1},
    {"prompt": "five birds", "count": 5, "of": {"class": "bird"}},
]
NO_IMAGES = ("adversarial.kind=none", "backward_simulation.probability=1")


def write(file: Path, text: str) -> Path:
    file.write_text(text, encoding="utf-8")
    return file


def as_jsonl(file: Path, rows=ROWS) -> Path:
    return write(file, "".join(json.dumps(row) + "\n" for row in rows))


def opened(file: Path):
    return open_dataset(file, (32, 32), (4, 4, 4), latents_scaling=lambda: 1 / 0)


def test_lines_and_rows_are_prompts_with_their_fields(tmp_path):
    lines = opened(write(tmp_path / "p.txt", "two cats\n\n  a dog, \u00e4ltlich\n"))
    assert [*lines.all_prompts()] == ["two cats", "a dog, \u00e4ltlich"]
    assert not lines.has_fields and lines[Position(1, 5, 1)].fields == {}
    rows = opened(as_jsonl(tmp_path / "p.jsonl"))
    items = [rows[Position(3, 7, item)] for item in range(3)]
    assert [(i.prompt, i.index, i.image, i.latents) for i in items] == [
        (row["prompt"], 7, None, None) for row in ROWS
    ]
    assert [item.fields for item in items] == ROWS and rows.has_fields
    bare = opened(as_jsonl(tmp_path / "bare.jsonl", [{"caption": "a dog"}]))
    assert [*bare.all_prompts()] == ["a dog"] and not bare.has_fields
    with (tmp_path / "p.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["count", "text"], ["2", "cats, two"]])
    (item,) = [opened(tmp_path / "p.csv")[Position(1, 0, 0)]]
    assert (item.prompt, item.fields) == ("cats, two", {"count": "2", "text": "cats, two"})


def test_workers_and_ranks_have_the_same_list(tmp_path):
    rows = opened(as_jsonl(tmp_path / "p.jsonl"))
    sent = pickle.loads(pickle.dumps(rows))
    assert [sent[Position(1, 0, i)].fields for i in range(3)] == ROWS
    (tmp_path / "elsewhere").mkdir()
    same, other = (
        opened(as_jsonl(tmp_path / "elsewhere" / name, chosen))
        for name, chosen in (("q.jsonl", ROWS), ("r.jsonl", [*ROWS[:2], {**ROWS[2], "count": 4}]))
    )
    assert rows.fingerprint() == same.fingerprint() != other.fingerprint()


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_groups_split_and_resume_as_those_of_images(world_size, accumulation, tmp_path):
    """Every second iteration has groups of four, which lie in several micro-batches."""
    data = opened(as_jsonl(tmp_path / "p.jsonl", [{"prompt": f"{i}", "n": i} for i in range(7)]))

    def drawn(start: int, num: int, **split: int) -> list[list[tuple[int, str, int]]]:
        ranks = [
            islice(batches(data, Share(5, 8, rank=rank, group_size=4, group_every=2, **split),
                           0, False, start), num)
            for rank in range(split.get("world_size", 1))
        ]  # fmt: skip
        together = [[b for parts in step for b in parts] for step in zip(*ranks, strict=True)]
        assert not any(batch.has_images for step in together for batch in step)
        return [
            [(i, p, f["n"]) for b in step
             for i, p, f in zip(b.indices, b.prompts, b.fields, strict=True)]
            for step in together
        ]  # fmt: skip

    whole = drawn(1, 6)
    split = dict(world_size=world_size, grad_accumulation=accumulation)
    assert drawn(1, 6, **split) == whole and drawn(3, 4, **split) == whole[2:]
    for iteration, step in enumerate(whole, 1):
        assert [i for i, _, _ in step] == [*range(8)]
        assert all(prompt == str(n) for _, prompt, n in step)
        if iteration % 2 == 0:
            assert len({p for _, p, _ in step[:4]}) == len({p for _, p, _ in step[4:]}) == 1


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("p.txt", "\n \n", "p.txt holds no prompts"),
        ("p.jsonl", '{"prompt": "a"}\n{"count": 2}\n', "p.jsonl, line 2 has no prompt"),
        ("p.jsonl", '{"count": 2}\n{"count": 3}\n', "has no column of prompts (prompt, prompts, "),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": " "}\n', "line 2, column 'prompt' is empty"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": "\\ud83d"}\n', "half of a character"),
        ("p.csv", "prompt,n\na,1,2\n", "has 3 cells, its table 2 columns"),
    ],
)
def test_what_is_no_prompt_is_named(name, text, said, tmp_path):
    with pytest.raises(ValueError) as refused:
        opened(write(tmp_path / name, text))
    assert said in str(refused.value) and "\n" not in str(refused.value)
    with pytest.raises(ValueError, match=r"gone.jsonl does not exist; expected .*\.jsonl, "):
        opened(tmp_path / "gone.jsonl")


# -------------------------------------------------------------------------- what looks at images


def config_of(file: Path, *overrides: str):
    return load_config(TINY, [f"paths.dataset={file}", *overrides])


ADVERSARY = ("adversarial.kind vfm", "adversarial.kind=none")
SIMULATED = ("backward_simulation.probability 0.5", "backward_simulation.probability=1")


@pytest.mark.parametrize(
    ("overrides", "faults"),
    [
        ((), (ADVERSARY, SIMULATED)),
        (("adversarial.kind=none",), (SIMULATED,)),
        (("adversarial.weight=0",), (SIMULATED,)),
        (("backward_simulation.probability=1",), (ADVERSARY,)),
    ],
)
def test_a_run_that_would_look_at_images_is_refused_with_every_key(overrides, faults, tmp_path):
    file = write(tmp_path / "p.txt", "a dog\n")
    config = config_of(file, *overrides)
    with pytest.raises(ValueError) as refused:
        read_run(config, RECIPES[config.recipe].family)
    keys, mended = (" and ".join(f[0] for f in faults), " ".join(f[1] for f in faults))
    said = f"{file} has prompts and no images, which {keys} would look at: say {mended}"
    assert str(refused.value) == f"paths.dataset {said}"
    status, tree = checked(file, tmp_path / "out", TINY, f"paths.dataset={file}", *overrides)
    assert status == 1 and found(tree)["does not fit"]["words"] == str(refused.value)
    mended = config_of(file, *(f[1] for f in faults), *overrides)
    assert isinstance(read_run(mended, RECIPES[config.recipe].family).data, PromptList)


def test_classifiers_of_diffused_latents_look_at_them_too(tmp_path):
    file = write(tmp_path / "p.txt", "a dog\n")
    config = load_config("configs/sdxl/sdxl_dmd2_tiny.yaml", [f"paths.dataset={file}"])
    with pytest.raises(ValueError, match=r"which adversarial\.kind bottleneck "):
        read_run(config, RECIPES[config.recipe].family)


def test_commands_that_are_of_images_say_so(tmp_path, capsys):
    file = write(tmp_path / "p.txt", "a dog\n")
    words = [TINY, "--output", str(tmp_path / "out"), f"paths.dataset={file}"]
    assert status_of(reconstruction_error, [*words, "--num_samples", "2"]) == 2
    said = capsys.readouterr().err
    assert f"paths.dataset {file} has prompts and no images, of which xi(t) is" in said
    assert status_of(cache, [*words, "--latents"]) == 2
    assert f"--latents: {file} holds prompts alone" in capsys.readouterr().err


# ------------------------------------------------------------------------------------- data.check


def test_a_check_reads_prompts_and_counts_columns(tmp_path, caplog):
    rows = [*ROWS, {"prompt": " ".join(["word"] * 100), "count": 1}, {"prompt": "a dog"}]
    file = as_jsonl(tmp_path / "p.jsonl", rows)
    status, tree = checked(file, tmp_path / "out", TINY, *NO_IMAGES)
    findings = found(tree)
    assert status == 0 and tree["num"] == 5
    assert tree["columns"] == {"prompt": 5, "count": 4, "of": 2}
    assert findings["long captions, tokenizer_2"]["samples"] == ["prompt 3"]
    assert findings["repeated captions"]["words"].startswith("2 of 5")
    assert "the run draws" in caplog.text and (tmp_path / "out" / "numbers.png").exists()
    assert checked(file, tmp_path / "alone")[0] == 0  # no resolution is asked for
    empty = write(tmp_path / "none.txt", "")
    assert status_of(check.main, [str(empty)]) == 2
