"""`python -m senseflow.report`: what stands on the page, and what the command needs."""

import json
import os
import subprocess
import sys
import time

import yaml
from made_up_run import (
    LONG_PROMPT,
    ROOT,
    make_samples,
    picture,
    rows,
    sample,
    write_rows,
)
from PIL import Image
from report_page import write

from senseflow.report import __main__ as report

PROMPTS = ["a red seven", "a <b>blue</b> two & a “green” one", LONG_PROMPT]


# ------------------------------------------------------------------------------- what is shown


def test_the_head(run):
    page = write(run)
    assert page.all("h1") and "my <run>" in page.text
    assert "flux_senseflow" in page.text and "assets/tiny/flux/pipeline" in page.text
    assert "400 of 400 (100%)" in page.text and "all 400 iterations done" in page.text
    assert "10 min, 1.5 s per iteration" in page.text  # 400 iterations of 1.5 s
    assert "runs/<my> data/data.json" in page.text
    titles = [a["id"] for a in page.all("section") if "id" in a]
    assert titles == ["signals", "curves", "strips", "configuration"]


def test_the_page_is_one_file_that_needs_nothing(run, tmp_path):
    teacher = make_samples(tmp_path / "t", PROMPTS)
    page = write(run, "--teacher_images", teacher, output=tmp_path / "page.html")
    names = {tag for tag, _ in page.elements}
    assert not names & {"script", "iframe", "object", "embed", "base", "form", "video"}
    for tag, attributes in page.elements:
        for name in ("src", "href", "srcset", "data", "action"):
            value = attributes.get(name) or ""
            assert value.startswith(("data:", "#")) or not value, (tag, value)
        assert not any(name.startswith("on") for name in attributes)
    style = (tmp_path / "page.html").read_text(encoding="utf-8").partition("<style>")[2]
    assert "url(" not in style and "@import" not in style.partition("</style>")[0]


def test_every_measure_has_a_curve_with_a_text(run):
    page = write(run)
    drawings = [a["aria-label"] for a in page.all("svg") if a.get("role") == "img"]
    names = {name for name in rows(1)[0] if name != "iteration"}
    alone = {n for n in names if not n.startswith(("lr/", "time_s/"))} | {"time_s/iteration"}
    for name in alone:
        assert sum(label.startswith(f"{name}: ") for label in drawings) == 1, name
    assert len(drawings) == len(alone) + 2  # learning rates and phases share one each
    assert any("learning rates: generator from 0.0001" in label for label in drawings)
    assert "None of the 14 rules found anything suspicious." in page.text
    assert f"iteration 10: loss/isg {rows(1)[0]['loss/isg']:.3g}" in page.text  # on hover


def test_measures_nobody_named_are_shown_too(own):
    write_rows(own, [{**row, "lora/norm": 2.0 + row["iteration"]} for row in rows()])
    page = write(own)
    assert "Other measures" in page.text
    assert any((a.get("aria-label") or "").startswith("lora/norm: ") for a in page.all("svg"))


def test_signals_stand_on_the_page_and_at_their_curve(own):
    bad = [{**row, "ida/gap": 1e-4 * row["iteration"]} for row in rows()]
    write_rows(own, bad)
    page = write(own)
    assert "gap between fake score and student grows steadily" in page.text
    assert "1 warning signal" in page.text
    warned = [a for a in page.all("figure") if "warned" in (a.get("class") or "")]
    assert [a["id"] for a in warned] == ["curve-ida-gap"]
    links = {a["href"][1:] for a in page.all("a")}
    ids = {a["id"] for _, a in page.elements if a.get("id")}
    assert links <= ids


def test_ids_are_unique(own):
    page = write(own)
    ids = [a["id"] for _, a in page.elements if a.get("id")]
    assert len(ids) == len(set(ids))


def test_strips_are_bounded_and_evenly_spaced(own):
    for iteration in range(10, 410, 10):
        picture(own / "samples" / f"step_{iteration:07d}.png", (40, 30), iteration)
    page = write(own, "--num_strips", "5")
    alts = [a["alt"] for a in page.all("img")]
    assert [int(alt.split("iteration ")[1].split(",")[0]) for alt in alts] == [
        10, 110, 210, 300, 400,
    ]  # fmt: skip
    assert "5 of 40 are shown, evenly spaced." in page.text
    assert len(write(own).all("img")) == 12


def test_large_pictures_are_made_smaller(own):
    """Noise does not compress: 3000 x 1500 pixels are 13 MB as they are."""
    picture(own / "samples" / "step_0000400.png", (3000, 1500), noise=True)
    page = write(own)
    last = page.all("img")[-1]
    assert (last["width"], last["height"]) == ("1400", "700")
    assert last["src"].startswith("data:image/jpeg") and len(last["src"]) < 2_000_000


def test_samples_side_by_side(run, tmp_path):
    teacher = make_samples(tmp_path / "teacher", PROMPTS)
    four, two = (make_samples(tmp_path / str(k), PROMPTS, student=k) for k in (4, 2))
    page = write(
        run, "--teacher_images", teacher, "--student_images", four, two, output=tmp_path / "p.html"
    )
    alts = [a["alt"] for a in page.all("img")][3:]  # after the strips
    wanted = [
        f"{who}: {prompt}"
        for prompt in PROMPTS
        for who in ("teacher, 28 steps", "student, 4 steps", "student, 2 steps")
    ]
    assert alts == wanted
    assert "a <b>blue</b> two & a “green” one" in page.text
    assert "no counterpart" not in page.text
    assert "student, 4 steps (euler, iteration 400)" in page.text


def test_folders_of_evaluate_generate_are_samples_too(run, tmp_path):
    """Which writes seed_0/, seed_1/, ..."""
    for seed in (0, 1):
        sample(tmp_path / "teacher" / f"seed_{seed}", 0, "a fox", 1_000_000 * seed)
        folder = tmp_path / "student_4_cps_0.7" / f"seed_{seed}"
        way = dict(checkpoint="x", steps=4, sampler="cps", eta=0.7)
        sample(folder, 0, "a fox", 1_000_000 * seed, **way)
    flags = ["--teacher_images", tmp_path / "teacher"]
    flags += ["--student_images", tmp_path / "student_4_cps_0.7"]
    page = write(run, *flags, output=tmp_path / "p.html")
    alts = [a["alt"] for a in page.all("img")][3:]
    assert alts == 2 * ["teacher, 28 steps: a fox", "student, 4 steps: a fox"]
    assert "student, 4 steps (cps, eta 0.7)" in page.text
    assert "no counterpart" not in page.text


def test_samples_are_matched_by_prompt_and_seed_not_by_name(run, tmp_path):
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    for index, prompt in enumerate("abc"):
        sample(teacher, index, f"the prompt {prompt}", 7)
    sample(student, 0, "the prompt c", 7, checkpoint="x", steps=4)
    sample(student, 1, "the prompt a", 8, checkpoint="x", steps=4)
    sample(student, 2, "the prompt d", 7, checkpoint="x", steps=4)
    flags = ["--teacher_images", teacher, "--student_images", student]
    page = write(run, *flags, output=tmp_path / "p.html")
    alts = [a["alt"] for a in page.all("img")][3:]
    assert alts == ["teacher, 28 steps: the prompt c", "student, 4 steps: the prompt c"]
    assert "2 of 3 images of" in page.text
    assert "“the prompt a” (seed 8, another seed there); “the prompt d” (seed 7)" in page.text
    assert "“the prompt b” (seed 7)" in page.text


def test_samples_of_other_sizes_are_named(run, tmp_path):
    """The teacher alone is sampled at its own default size."""
    card = {"checkpoint": "x", "steps": 4, "height": 32, "width": 32}
    sample(tmp_path / "teacher", 0, "a", 0, height=1024, width=1024)
    sample(tmp_path / "student", 0, "a", 0, **card)
    sample(tmp_path / "again", 0, "a", 0, **card)
    flags = ["--student_images", tmp_path / "student", tmp_path / "again"]
    assert "at one size" not in write(run, *flags, output=tmp_path / "p.html").text
    page = write(run, "--teacher_images", tmp_path / "teacher", *flags, output=tmp_path / "p.html")
    assert page.text.count("of 32 × 32 pixels") == 2 and "of 1024 × 1024" in page.text
    assert "student, 4 steps, again" in page.text  # folders with one label are told apart


def test_the_number_of_samples_is_bounded(run, tmp_path):
    teacher = make_samples(tmp_path / "t", [f"prompt {k}" for k in range(60)])
    page = write(run, "--teacher_images", teacher, output=tmp_path / "p.html")
    assert len(page.all("img")) == 3 + 24 and "24 of 60 are shown, evenly spaced." in page.text


def test_results(run, tmp_path):
    file = tmp_path / "results.json"
    lines = [{"name": "student", "metric": "FID-T <patch>", "value": 12.5, "num_images": 5000}]
    file.write_text(json.dumps(lines))
    page = write(run, "--results", file, output=tmp_path / "p.html")
    assert page.all("table") and "FID-T <patch>" in page.text and "12.5" in page.text


def test_the_configuration_is_compared_with_the_published_one(own):
    """made_up_run changes dmd.weight and paths.dataset of the embedded teacher's YAML."""
    page = write(own)
    published = yaml.safe_load((ROOT / "configs/FLUX/flux_senseflow.yaml").read_text())
    assert published["dmd"]["weight"] == 1.0 and published["train"]["batch_size"] == 8
    marked = page.text.partition("Configuration values"[:13])[2]
    assert "weight 0.75 flux_senseflow.yaml: 1" in marked
    assert "batch_size 48 flux_senseflow.yaml: 8" in marked
    assert "lr 0.0001 flux_senseflow.yaml: 1e-05" in marked
    assert "fake_score_lr 0.0003" in marked and "eps 1e-08 flux" not in marked
    assert "2 of them, marked, also from flux_senseflow_tiny.yaml" in page.text
    assert len([a for a in page.all("div") if a.get("class") == "own"]) == 2


def test_keys_a_yaml_does_not_have_are_no_differences(own):
    """They have their defaults, as norm_groups in FLUX's YAMLs."""
    config = yaml.safe_load((own / "config.yaml").read_text())
    config["adversarial"]["norm_groups"] = 32
    (own / "config.yaml").write_text(yaml.safe_dump(config))
    page = write(own)
    assert "norm_groups 32 not in flux_senseflow.yaml" in page.text
    assert "2 of them, marked, also from flux_senseflow_tiny.yaml" in page.text


def test_the_published_recipe_itself_differs_in_nothing(own):
    """As `save_config` writes it: pairs for single numbers, floats for words such as 1e-5."""
    published = yaml.safe_load((ROOT / "configs/FLUX/flux_senseflow.yaml").read_text())
    published["train"]["resolution"] = [1024, 1024]
    for key in ("lr", "fake_score_lr", "discriminator_lr", "eps"):
        published["optimizer"][key] = float(published["optimizer"][key])
    (own / "config.yaml").write_text(yaml.safe_dump(published))
    page = write(own)
    assert "0 of" in page.text and not [a for a in page.all("div") if a.get("class") == "own"]


# -------------------------------------------------------------------------------------- states


def test_still_going_and_stopped(own):
    write_rows(own, rows(20))
    (own / "last_iter").write_text("200\n")
    page = write(own)
    assert "still going" in page.text and "iteration 200 of 400" in page.text
    assert "5 min to go" in page.text  # 200 iterations of 1.5 s
    old = time.time() - 7200
    for file in [own / "stats.jsonl", *(own / "samples").iterdir()]:
        os.utime(file, (old, old))
    page = write(own)
    assert "stopped" in page.text and "written 2 h ago" in page.text


def test_resumes_are_read_from_tensorboard(own):
    """Two starts, 10 to 200 and 210 to 400; the second one's loss is another."""
    from torch.utils.tensorboard import SummaryWriter

    changed = [{**row, "loss/isg": (5 if row["iteration"] > 200 else 1) * row["loss/isg"]}
               for row in rows()]  # fmt: skip
    write_rows(own, changed)
    for start, suffix in ((10, ".a"), (210, ".b")):
        writer = SummaryWriter(str(own / "tensorboard"), filename_suffix=suffix)
        for iteration in range(start, start + 200, 10):
            writer.add_scalar("loss/isg", 1.0, iteration)
        writer.close()
    page = write(own)
    assert "started again 1 time" in page.text
    assert "steps from" in page.text and "at iteration 210, where the run was resumed" in page.text
    for file in (own / "tensorboard").iterdir():
        file.write_bytes(file.read_bytes()[:-7])  # cut short by a kill
    assert "started again 1 time" in write(own).text


# --------------------------------------------------------------------------------- the command


def test_it_needs_no_torch(run, tmp_path):
    """Nor anything that imports it; --help needs no other library at all."""
    teacher = make_samples(tmp_path / "t", PROMPTS)
    words = [str(run), "--teacher_images", str(teacher), "--output", str(tmp_path / "p.html")]
    program = (
        "import sys; from senseflow.report import __main__ as report; "
        "assert 'numpy' not in sys.modules; "
        f"assert report.main({words!r}) == 0; "
        "heavy = {'torch', 'diffusers', 'transformers', 'matplotlib', 'tensorflow'}; "
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stderr.endswith("KiB\n") and Image.open(teacher / "grid.png")


def test_help_says_what_it_does(run):
    line = [sys.executable, "-m", "senseflow.report", "--help"]
    result = subprocess.run(line, capture_output=True, text=True)
    assert result.returncode == 0 and "python -m senseflow.report runs/flux" in result.stdout
    wrong = subprocess.run([*line[:-1], str(run), "--num_strips", "many"], capture_output=True)
    assert wrong.returncode == 2 and wrong.stderr.startswith(b"error: ")


def test_ctrl_c_leaves_the_old_page(own, monkeypatch, capsys):
    write(own)
    before = (own / "report.html").read_text()

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt  # what Ctrl-C raises where it is not ignored, as in background jobs

    monkeypatch.setattr(os, "fsync", interrupt)
    assert report.main([str(own)]) == 130
    assert capsys.readouterr().err.endswith("stopped: nothing was written\n")
    assert (own / "report.html").read_text() == before and not list(own.glob("*.partial"))
