"""The layouts of GenEval and T2I-CompBench, and their result files back in our table."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from small import BASES, make_student, pictures, sidecar

from senseflow.evaluate.__main__ import main
from senseflow.evaluate.layouts import GENEVAL_TASKS, LAYOUTS, SEED_STRIDE
from senseflow.evaluate.official import read_geneval, read_t2i_compbench

METADATA = [
    {"tag": "single_object", "include": [{"class": "seven", "count": 1}], "prompt": "a red seven"},
    {
        "tag": "color_attr",
        "include": [{"class": "two", "count": 1, "color": "blue"}],
        "exclude": [{"class": "two", "count": 2}],
        "prompt": "a blue two",
    },
]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_student("flux", tmp_path_factory.mktemp("flux") / "run")


def draw(run: Path, layout: str, files: list[Path], output: Path, *flags: object) -> int:
    line = ["generate", "--base", BASES["flux"], "--checkpoint", run, "--no_teacher"]
    line += ["--layout", layout, "--prompts_file", *files, "--output_dir", output, *flags]
    return main([str(word) for word in [*line, "--steps", 1, "--batch_size", 4]])


def metadata_file(folder: Path) -> Path:
    file = folder / "evaluation_metadata.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in METADATA))
    return file


def test_geneval_layout(run, tmp_path):
    """What evaluate_images.py walks: digits, metadata.jsonl, samples with names of digits."""
    assert draw(run, "geneval", [metadata_file(tmp_path)], tmp_path / "out") == 0
    folder = tmp_path / "out" / "student_1_x0"
    assert sorted(f.name for f in folder.iterdir()) == ["00000", "00001"]
    for index, line in enumerate(METADATA):
        place = folder / f"{index:05d}"
        assert json.loads((place / "metadata.jsonl").read_text()) == line
        names = sorted(f.name for f in (place / "samples").iterdir())
        assert names == ["0000.png", "0001.png", "0002.png", "0003.png"]
    drawn = pictures(folder)
    assert len({image.tobytes() for image in drawn.values()}) == 8
    made = sidecar(folder / "00001" / "sidecars" / "0003.json")
    assert made["seed"] == 1 + 3 * SEED_STRIDE and made["prompt"] == "a blue two"


def test_geneval_on_two_shards_is_the_same_and_complete(run, tmp_path):
    files = [metadata_file(tmp_path)]
    for shard in ("0/3", "1/3", "2/3"):
        assert draw(run, "geneval", files, tmp_path / "out", "--shard", shard) == 0
    folder = tmp_path / "out" / "student_1_x0"
    assert len(pictures(folder)) == 8
    texts = [json.loads(f.read_text()) for f in sorted(folder.glob("*/metadata.jsonl"))]
    assert texts == METADATA
    other = tmp_path / "evaluation_metadata.jsonl"
    other.write_text(json.dumps({**METADATA[0], "include": []}) + "\n")
    assert draw(run, "geneval", [other], tmp_path / "out") == 2


def test_t2i_compbench_layout(run, tmp_path):
    """Only images in samples, numbered throughout, the prompt before the first underscore."""
    texts = {"color": ["a red seven", "a blue two\ttwo, blue"], "non_spatial": ["a two and a six."]}
    files = [tmp_path / "color_val.txt", tmp_path / "non_spatial_val.txt"]
    for file, lines in zip(files, texts.values(), strict=True):
        file.write_text("\n".join(lines) + "\n")
    assert draw(run, "t2i_compbench", files, tmp_path / "out") == 0
    folder = tmp_path / "out" / "student_1_x0"
    assert sorted(f.name for f in folder.iterdir()) == ["color", "non_spatial"]
    names = [f.name for f in (folder / "color" / "samples").iterdir()]
    names.sort(key=lambda name: int(re.fullmatch(r"[^_]+_(\d{6})\.png", name)[1]))
    assert names == [f"a red seven_{n:06d}.png" for n in range(10)] + [
        f"a blue two_{n:06d}.png" for n in range(10, 20)
    ]
    drawn = pictures(folder / "non_spatial" / "samples")
    assert list(drawn) == [f"a two and a six._{n:06d}.png" for n in range(10)]
    assert len({image.tobytes() for image in drawn.values()}) == 10
    assert draw(run, "t2i_compbench", files, tmp_path / "out", "--seeds", 5) == 2  # other numbers


def test_layouts_draw_the_same_images(run, tmp_path):
    """The seed of a prompt's k-th image does not depend on the layout."""
    (tmp_path / "color.txt").write_text("a red seven\na blue two\n")
    (tmp_path / "plain.txt").write_text("a red seven\na blue two\n")
    two = ("--seeds", 2)
    assert draw(run, "geneval", [metadata_file(tmp_path)], tmp_path / "g", *two) == 0
    assert draw(run, "t2i_compbench", [tmp_path / "color.txt"], tmp_path / "t", *two) == 0
    assert draw(run, "seeds", [tmp_path / "plain.txt"], tmp_path / "s", *two) == 0
    by_prompt = [list(pictures(tmp_path / x).values()) for x in "gts"]
    geneval = by_prompt[0]
    t2i = [by_prompt[1][k] for k in (2, 3, 0, 1)]  # "a blue two" sorts first
    seeds = [by_prompt[2][k] for k in (0, 2, 1, 3)]
    for a, b, c in zip(geneval, t2i, seeds, strict=True):
        assert max(np.abs(a.astype(int) - b).max(), np.abs(a.astype(int) - c).max()) <= 1


def test_prompts_a_file_name_cannot_hold_are_refused(tmp_path):
    file = tmp_path / "color_val.txt"
    for text in ("a red/blue seven", "a red_seven", "long " * 60):
        file.write_text(f"a two\n{text}\n")
        with pytest.raises(ValueError, match="prompt 1 cannot be part of a file's name"):
            LAYOUTS["t2i_compbench"].read([file])
    file.write_text("x " * 118)  # 235 bytes, with _000000.png and .partial within 255
    assert LAYOUTS["t2i_compbench"].read([file])[0].name == "color"
    other = tmp_path / "complex_val_action.txt"
    other.write_text("a two\n")
    with pytest.raises(ValueError, match="one file for each category"):
        LAYOUTS["t2i_compbench"].read([other])


# Result files


def geneval_line(tag: str, correct: bool, prompt: str) -> str:
    """As evaluate_images.py writes it through pandas."""
    row = {"filename": f"x/{prompt}.png", "tag": tag, "prompt": prompt, "correct": correct}
    return json.dumps({**row, "reason": "", "metadata": json.dumps({"prompt": prompt})})


def test_geneval_results_are_the_summarys_numbers(tmp_path):
    """Tasks of unlike size: the overall score is the mean of tasks, not of images."""
    correct = {"single_object": [1, 1, 1, 0], "two_object": [1, 0], "counting": [0, 0, 0, 1, 0]}
    correct |= {"colors": [1], "position": [0, 0], "color_attr": [1, 1, 0]}
    lines = [
        geneval_line(t, bool(c), f"{t}{n // 2}")
        for t, cs in correct.items()
        for n, c in enumerate(cs)
    ]
    file = tmp_path / "results.jsonl"
    file.write_text("\n".join(reversed(lines)) + "\n")
    found = {entry["metric"]: entry for entry in read_geneval("student", file)}
    by_hand = {"single_object": 3 / 4, "two_object": 1 / 2, "counting": 1 / 5, "colors": 1}
    by_hand |= {"position": 0, "color_attr": 2 / 3}
    for task, value in by_hand.items():
        assert found[f"geneval_{task}"]["value"] == pytest.approx(value)
    mean = (0.75 + 0.5 + 0.2 + 1 + 0 + 2 / 3) / 6
    assert found["geneval"]["value"] == pytest.approx(mean, abs=1e-12)
    assert (found["geneval"]["num_images"], found["geneval"]["num_prompts"]) == (17, 10)
    assert (found["geneval_counting"]["num_images"], found["geneval_counting"]["num_prompts"]) == (
        5,
        3,
    )


def test_geneval_without_all_tasks_has_no_mean(tmp_path, caplog):
    file = tmp_path / "results.jsonl"
    file.write_text(geneval_line("colors", True, "a") + "\n")
    assert [entry["metric"] for entry in read_geneval("s", file)] == ["geneval_colors"]
    missing = ", ".join(task for task in GENEVAL_TASKS if task != "colors")
    assert f"no mean, as it holds no image of {missing}" in caplog.text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no results"),
        (geneval_line("colors", True, "a") + "\n{", "line 2 of .* is not valid JSON"),
        ('{"tag": "colors"}', "line 1 of .* it has no 'correct'"),
        ('{"tag": "colours", "correct": true, "metadata": ""}', "tag 'colours'"),
    ],
)
def test_wrong_geneval_results_are_named(text, said, tmp_path):
    (tmp_path / "results.jsonl").write_text(text)
    with pytest.raises(ValueError, match=said):
        read_geneval("s", tmp_path / "results.jsonl")
    with pytest.raises(ValueError, match="cannot be read"):
        read_geneval("s", tmp_path / "no.jsonl")


def answers(folder: Path, place: str, values: list) -> None:
    (folder / place).mkdir(parents=True)
    rows = [{"question_id": n, "answer": value} for n, value in enumerate(values)]
    (folder / place / "vqa_result.json").write_text(json.dumps(rows))


def test_t2i_compbench_results_are_means(tmp_path, caplog):
    """BLIP-VQA writes its answers as text, the others as numbers."""
    answers(tmp_path, "color/annotation_blip", ["0.5000", "1.0000", "0.0000", "0.2500"])
    answers(tmp_path, "spatial/labels/annotation_obj_detection_2d", [0.75, 0, 0.5])
    answers(tmp_path, "non_spatial/annotation_clip", [0.31, 0.29])
    answers(tmp_path, "complex/annotation_3_in_1", [0.4])
    answers(tmp_path, "complex/annotation_blip", ["0.9"])  # a part of the 3-in-1 alone
    (tmp_path / "color" / "samples").mkdir()
    for name in ("a cat_000000.png", "a cat_000001.png", "b dog_000002.png"):
        (tmp_path / "color" / "samples" / name).touch()
    found = {entry["metric"]: entry for entry in read_t2i_compbench("s", tmp_path)}
    values = {metric.removeprefix("t2i_compbench_"): e["value"] for metric, e in found.items()}
    assert values == {
        "color": pytest.approx(0.4375),
        "spatial": pytest.approx(1.25 / 3),
        "non_spatial": pytest.approx(0.3),
        "complex": pytest.approx(0.4),
    }
    color = found["t2i_compbench_color"]
    assert (color["num_images"], color["num_prompts"]) == (4, 2)
    assert color["notes"] == ["color: scores of 4 of 3 images"]
    assert "no scores of shape, texture" in caplog.text


def test_wrong_t2i_compbench_results_are_named(tmp_path):
    with pytest.raises(ValueError, match="is not a folder"):
        read_t2i_compbench("s", tmp_path / "no")
    with pytest.raises(ValueError, match="holds no scores"):
        read_t2i_compbench("s", tmp_path)
    answers(tmp_path, "color/annotation_blip", ["yes"])
    with pytest.raises(ValueError, match=r"'answer': 'yes'.* has no number"):
        read_t2i_compbench("s", tmp_path)
    answers(tmp_path, "spatial/labels/annotation_obj_detection_2d", [1])
    answers(tmp_path, "spatial/labels/annotation_obj_detection", [1])
    (tmp_path / "color/annotation_blip/vqa_result.json").write_text('[{"answer": "NaN"}]')
    with pytest.raises(ValueError, match="not finite"):
        read_t2i_compbench("s", tmp_path)
    (tmp_path / "color/annotation_blip/vqa_result.json").unlink()
    with pytest.raises(ValueError, match="are both there"):
        read_t2i_compbench("s", tmp_path)
