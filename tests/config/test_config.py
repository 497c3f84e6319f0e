"""The strict YAML reader: what it accepts, what it refuses, and how it says so."""

import dataclasses
import logging
from pathlib import Path

import pytest
import yaml

from senseflow.config.config import Config, differences, load_config, save_config
from senseflow.config.load import check_split

RECIPE = Path("configs/FLUX/flux_senseflow.yaml")


def edited(tmp_path, **changes) -> Path:
    """The FLUX recipe with `section__key=value`; a value of ... removes the key."""
    tree = yaml.safe_load(RECIPE.read_text())
    for name, value in changes.items():
        section, _, key = name.partition("__")
        if value is ...:
            del tree[section][key]
        else:
            tree[section][key] = value
    file = tmp_path / "edited.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def test_flux_recipe_has_the_published_numbers():
    c = load_config(RECIPE)
    assert c.anchors.times == (1000, 750, 500, 250) and c.train.iter_num == 12000
    assert (c.fake_score.ttur, c.ida.lam) == (5, 0.97)
    assert (c.adversarial.weight, c.isg.weight, c.isg.margin) == (2.0, 1.0, 20)
    assert c.dmd.guidance == c.isg.guidance == (1, 8)
    assert c.dmd.time == c.fake_score.time == "logit_normal"
    assert c.backward_simulation.probability == 0.5
    o = c.optimizer
    assert (o.lr, o.fake_score_lr, o.discriminator_lr) == (1e-5, 1e-5, 1e-5)
    assert (o.betas, o.eps, o.weight_decay, o.max_grad_norm) == ((0.9, 0.999), 1e-8, 0, 1)
    assert (c.lr_scheduler.start_factor, c.lr_scheduler.warmup_iterations) == (0.5, 500)
    assert (c.data.max_sequence_length, c.train.resolution) == (512, (1024, 1024))
    assert (c.train.save_interval, c.train.batch_size) == (1500, 8)


def test_a_file_that_names_no_text_layer_keeps_the_plain_one(tmp_path):
    assert load_config(RECIPE).adversarial.text_layer == "equalized"
    old = edited(tmp_path, adversarial__text_layer=...)
    assert load_config(old).adversarial.text_layer == "linear"


RECIPES = {
    "flux_senseflow": "FLUX",
    "sd35_senseflow": "SD35",
    "sd35_large_senseflow": "SD35",
    "sdxl_senseflow": "sdxl",
    "sdxl_dmd2": "sdxl",
    "flux2_klein_senseflow": "FLUX2",
    "z_image_senseflow": "Z-Image",
    "qwen_image_senseflow": "Qwen-Image",
}
REWARDED = ("flux", "sdxl", "sd35", "flux2_klein", "z_image", "qwen_image")
VFM_PATHS = {f"paths.{k}" for k in ("dinov2", "dinov2_weights", "clip", "clip_weights")}
VFM = {
    f"adversarial.{k}"
    for k in ("omega_power", "least_omega", "reference", "taps", "virtual_batch", "augment")
}
VFM |= {f"adversarial.{k}" for k in ("head_width", "text_layer", "spectral_norm")}
VFM |= VFM_PATHS | {"paths.clip_quick_gelu"}
BOTTLENECK = {f"adversarial.{k}" for k in ("time_range", "downsamplings", "norm_groups")}
FLUX_ONLY = {"student.fold_guidance", "student.guidance", "paths.flux_wo_guidance_embed"}


def recipe_file(name: str, suffix: str = "") -> Path:
    return Path("configs") / RECIPES[name] / f"{name}{suffix}.yaml"


@pytest.mark.parametrize("suffix", ["", "_tiny"])
@pytest.mark.parametrize("name", RECIPES)
def test_every_key_that_applies_stands_in_the_recipe(name, suffix):
    tree = yaml.safe_load(recipe_file(name, suffix).read_text())
    config = load_config(recipe_file(name, suffix))
    assert tree.pop("recipe") == config.recipe == name
    written = {f"{section}.{key}" for section, keys in tree.items() for key in keys}
    sections = dataclasses.asdict(config)
    del sections["recipe"], sections["reward"]
    possible = {f"{section}.{key}" for section, keys in sections.items() for key in keys}
    elsewhere = set() if name == "flux_senseflow" else set(FLUX_ONLY)
    elsewhere |= VFM if config.adversarial.kind == "bottleneck" else BOTTLENECK
    elsewhere |= {"data.max_sequence_length"} if "sdxl" in name else set()
    assert written == possible - elsewhere


@pytest.mark.parametrize("name", RECIPES)
def test_the_embedded_recipe_is_the_full_one_but_for_sizes_rates_batch_and_n(name):
    full, small = load_config(recipe_file(name)), load_config(recipe_file(name, "_tiny"))
    changed = {line.partition(":")[0] for line in differences(full, small)}
    method = ("anchors", "dmd", "ida", "isg", "student", "backward_simulation", "fake_score")
    assert {key for key in changed if key.startswith(method)} == {"fake_score.ttur"}
    sizes = {"adversarial.taps", "adversarial.downsamplings", "adversarial.least_omega"}
    assert {key for key in changed if key.startswith("adversarial")} <= sizes
    rates = {"optimizer.lr", "optimizer.fake_score_lr", "optimizer.discriminator_lr"}
    kept = {"optimizer.states"} if "qwen" in name else set()  # as its size asks for
    assert {key for key in changed if key.startswith("optimizer")} == rates | kept


@pytest.mark.parametrize(
    ("family", "form"),
    [*((family, form) for family in REWARDED for form in ("", "_tiny")),
     ("flux", "_lora")],
)  # fmt: skip
def test_a_recipe_with_rewards_is_senseflows_but_for_them_length_and_batch(family, form):
    folder = Path("configs") / RECIPES[f"{family}_senseflow"]
    plain, rewarded = (
        load_config(folder / f"{family}_{m}{form}.yaml") for m in ("senseflow", "dancegrpo")
    )
    changed = {line.partition(":")[0] for line in differences(plain, rewarded)}
    others = {key for key in changed if not key.startswith("reward.")}
    length = {"train.iter_num", "train.batch_size", "train.save_interval"}
    if form == "_tiny":  # of a short run, from a student, and with a teacher that is guided less
        length |= {"paths.initial", "lr_scheduler.decay_iterations"}
        length |= {"dmd.guidance", "isg.guidance", "anchors.times", "anchors.steps", "isg.margin"}
        length |= {"ema.decay", "optimizer.lr"}  # an average, which is slower
        assert set(plain.anchors.times) <= set(rewarded.anchors.times)  # which it has learned
        assert rewarded.dmd.guidance != plain.dmd.guidance
        for less, own in ((rewarded.dmd, plain.dmd), (rewarded.isg, plain.isg)):
            assert all(a <= b for a, b in zip(less.guidance, own.guidance, strict=True))
    assert {"recipe"} < others <= {"recipe", "train.grad_accumulation"} | length
    written = yaml.safe_load((folder / f"{family}_dancegrpo{form}.yaml").read_text())["reward"]
    assert written.keys() == dataclasses.asdict(rewarded.reward).keys()
    assert rewarded.reward.in_use and not plain.reward.in_use
    check_split(rewarded, 1 if form else 8)


def row(c: Config) -> tuple:
    """What METHOD's table of recipes says, in its order."""
    return (
        c.anchors.times,
        c.fake_score.ttur,
        c.ida.lam,
        (c.adversarial.kind, c.adversarial.weight, c.isg.weight),
        c.dmd.guidance,
        c.isg.guidance,
        c.isg.margin,
        (c.dmd.time, c.dmd.time_range),
        (c.fake_score.time, c.fake_score.time_range),
        c.backward_simulation.probability,
        (c.optimizer.lr, c.optimizer.fake_score_lr, c.optimizer.discriminator_lr),
        (c.train.save_interval, c.train.resolution),
    )


INTEGER, THOUSANDTHS = (999, 749, 499, 249), (1000, 750, 500, 250)
INNER, ALL = ("uniform", (20, 980)), (0, 1000)
PUBLISHED = {
    "sdxl_senseflow": (INTEGER, 5, None, ("vfm", 0.5, 0.2), (8, 8), (3, 15), 20, INNER,
                       ("uniform", (0, 999)), 0.5, (1e-6,) * 3, (3000, (1024, 1024))),
    "sd35_senseflow": (THOUSANDTHS, 10, 0.98, ("vfm", 0.1, 0.5), (2, 8), (2, 4), 50, INNER,
                       ("logit_normal", ALL), 0.5, (1e-6,) * 3, (3000, (1024, 1024))),
    "sd35_large_senseflow": (THOUSANDTHS, 5, 0.97, ("vfm", 0.1, 1.0), (3, 10), (5, 5), 50, INNER,
                             ("logit_normal", ALL), 0.5, (1e-6,) * 3, (3000, (1024, 1024))),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_have_the_published_numbers(name):
    assert row(load_config(recipe_file(name))) == PUBLISHED[name]


def test_dmd2_has_the_published_numbers():
    c = load_config(recipe_file("sdxl_dmd2"))
    a = c.adversarial
    assert (a.kind, a.weight, a.discriminator_weight, a.time_range) == (
        "bottleneck",
        0.005,
        0.01,
        (0, 999),
    )
    assert (a.downsamplings, a.norm_groups) == (3, 32)
    assert (c.ida.lam, c.isg.weight, c.backward_simulation.probability) == (None, 0, 1)
    assert (c.fake_score.ttur, c.dmd.guidance, c.anchors.times) == (5, (8, 8), INTEGER)
    assert c.data.separate_real and c.dmd.time_range == (20, 980)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__iter_nmu": 3}, r"unknown key train.iter_nmu.*train.iter_num"),
        ({"dmd__wieght": 1.0}, r"unknown key dmd.wieght.*dmd.weight"),
        (
            {"train__iter_num": "many"},
            r"train.iter_num: expected a whole number, got the text 'many'",
        ),
        ({"train__iter_num": 1.5}, r"train.iter_num: expected a whole number, got 1.5"),
        ({"train__deterministic": "on "}, r"train.deterministic: expected true or false"),
        ({"train__seed": True}, r"train.seed: expected a whole number, got true"),
        ({"optimizer__lr": "fast"}, r"optimizer.lr: expected a number, got the text 'fast'"),
        ({"optimizer__betas": [0.9]}, r"optimizer.betas: expected a list of 2"),
        ({"anchors__times": [1000, "x"]}, r"anchors.times\[1\]: expected a number"),
        ({"dmd__time": "gaussian"}, r"dmd.time: 'gaussian' is none of uniform, logit_normal"),
        ({"dmd__guidance": [8, 1]}, r"dmd.guidance \[8.0, 1.0\] must be \[low, high\]"),
        ({"ida__lam": 1.5}, r"ida.lam 1.5 must be from 0 to 1"),
        ({"ida__lam": float("nan")}, r"ida.lam nan must be from 0 to 1"),
        ({"isg__weight": float("nan")}, r"isg.weight nan must be from 0 to 1e6"),
        ({"backward_simulation__probability": 2}, r"probability 2.0 must be from 0 to 1"),
        ({"fake_score__ttur": 0}, r"fake_score.ttur 0 must be from 1 to 1e9"),
        ({"ema__decay": 1}, r"ema.decay 1.0 must be above 0 and below 1"),
        ({"optimizer__weight_decay": 1e5}, r"weight_decay 100000: at a learning rate of 1e-05"),
        ({"train__iter_num": ...}, r"missing key train.iter_num"),
        ({"lr_scheduler__warmup_iterations": 99999}, r"lr_scheduler: warm-up and decay take 99999"),
        (
            {"dmd__weight": 0, "isg__weight": 0, "adversarial__weight": 0},
            r"the generator has no loss",
        ),
        ({"adversarial__kind": "gan"}, r"adversarial.kind: 'gan' is none of vfm, bottleneck, none"),
        (
            {"adversarial__kind": "bottleneck", "dmd__weight": 0},
            r"adversarial.kind bottleneck stands on the fake score",
        ),
        ({"data__separate_real": True}, r"data.separate_real: the vfm adversary"),
    ],
)
def test_bad_values_are_named_with_file_and_key(tmp_path, changes, message):
    file = edited(tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as error:
        load_config(file)
    assert "edited.yaml" in str(error.value)


def test_a_recipe_that_does_not_exist_names_those_that_do():
    known = "flux_senseflow, sdxl_senseflow, sdxl_dmd2, sd35_senseflow, sd35_large_senseflow, "
    known += "flux2_klein_senseflow, z_image_senseflow, qwen_image_senseflow, "
    known += "flux_dancegrpo, sdxl_dancegrpo, sd35_dancegrpo, "
    known += "flux2_klein_dancegrpo, z_image_dancegrpo, qwen_image_dancegrpo"
    message = f"{RECIPE}: recipe: 'flux_sensflow' is none of {known}; the nearest is flux_senseflow"
    with pytest.raises(ValueError) as refused:
        load_config(RECIPE, ["recipe=flux_sensflow"])
    assert str(refused.value) == message


def test_files_that_are_no_config(tmp_path):
    with pytest.raises(ValueError, match=r"not found: .*nowhere.yaml"):
        load_config(tmp_path / "nowhere.yaml")
    (tmp_path / "a.yaml").write_text("train: [")
    with pytest.raises(ValueError, match=r"a.yaml is not valid YAML"):
        load_config(tmp_path / "a.yaml")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match=r"picture.png is not valid YAML"):
        load_config(tmp_path / "picture.png")
    (tmp_path / "b.yaml").write_text("just words")
    with pytest.raises(ValueError, match=r"b.yaml: expected sections"):
        load_config(tmp_path / "b.yaml")


def test_overrides_and_what_they_may_not_be():
    c = load_config(RECIPE, ["train.seed=7", "optimizer.lr=1e-4", "ida.lam=null", "dmd.guidance=3"])
    assert (c.train.seed, c.optimizer.lr, c.ida.lam, c.dmd.guidance) == (7, 1e-4, None, (3, 3))
    with pytest.raises(ValueError, match=r"not of the form key.sub=value"):
        load_config(RECIPE, ["train.seed"])
    with pytest.raises(ValueError, match=r"unknown section trian|unknown key trian.*train"):
        load_config(RECIPE, ["trian.seed=1"])
    with pytest.raises(ValueError, match=r"override .* is not valid YAML"):
        load_config(RECIPE, ["paths.dataset=*x"])
    with pytest.raises(ValueError, match="seed is not a section"):
        load_config(RECIPE, ["train.seed.x=1"])


def test_overrides_as_careless_hands_write_them(caplog):
    caplog.set_level(logging.INFO)
    config = load_config(RECIPE, ["train.iter_num =700", " train.seed= 3", "ida.lam = null"])
    assert (config.train.iter_num, config.train.seed, config.ida.lam) == (700, 3, None)
    assert not caplog.messages
    for words in (["train.seed", "=", "3"], ["=3"], ["train.seed"]):
        with pytest.raises(ValueError, match=r"form key.sub=value, without spaces around ="):
            load_config(RECIPE, words)
    again = load_config(RECIPE, ["train.seed=1", "train.log_interval=5", "train.seed=2"])
    assert again.train.seed == 2
    assert caplog.messages == ["train.seed is given twice: the last, '2', counts"]
    load_config(RECIPE, ["train.seed=1", "train.seed=1"])
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("value", [None, {"a": 1}, ["uniform"], 3, "error"])
def test_a_removed_key_is_refused_by_its_name_whatever_it_holds(tmp_path, value):
    with pytest.raises(ValueError, match=r"isg.midpoint: .* is no setting since 0.1.0: .*delete"):
        load_config(edited(tmp_path, isg__midpoint=value))


def test_a_student_that_is_never_updated_is_said(caplog):
    check_split(load_config(RECIPE, ["train.iter_num=500", "fake_score.ttur=500"]), 1)
    assert not caplog.messages
    check_split(load_config(RECIPE, ["train.iter_num=500", "fake_score.ttur=501"]), 1)
    (line,) = caplog.messages
    assert line == "fake_score.ttur 501 is above train.iter_num 500: the student is never updated"


def test_a_removed_key_is_passed_over_at_its_old_default_and_refused_otherwise(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    old = edited(tmp_path, isg__midpoint="uniform", isg__error_curve=None)
    assert load_config(old) == load_config(RECIPE)
    (line,) = caplog.messages
    assert "edited.yaml" in line and "isg.midpoint, isg.error_curve" in line
    caplog.clear()
    assert load_config(RECIPE, ["isg.midpoint=uniform"]) == load_config(RECIPE)
    (line,) = caplog.messages
    assert "isg.midpoint" in line and "error_curve" not in line
    with pytest.raises(ValueError, match=r"edited.yaml: isg.midpoint: 'error' .*0.1.0.*uniform"):
        load_config(edited(tmp_path, isg__midpoint="error", isg__error_curve="xi.json"))
    with pytest.raises(ValueError, match=r"isg.error_curve: 'xi.json' .* delete the key"):
        load_config(edited(tmp_path, isg__error_curve="xi.json"))


def test_resolved_config_reads_back_the_same(tmp_path):
    config = load_config(RECIPE, ["train.seed=3"])
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    other = load_config(RECIPE, ["train.seed=4"])
    assert differences(config, other) == ["train.seed: 3 -> 4"]


def test_sizes_may_be_one_number_or_two():
    assert load_config(RECIPE, ["train.resolution=[512, 768]"]).train.resolution == (512, 768)
    assert isinstance(load_config(RECIPE), Config)
