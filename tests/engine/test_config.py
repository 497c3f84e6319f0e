"""The strict YAML reader: what it accepts, what it refuses, and how it says so."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from senseflow.engine.config import Config, differences, load_config, save_config

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


def test_every_key_of_the_dataclasses_stands_in_the_recipe():
    tree = yaml.safe_load(RECIPE.read_text())
    config = dataclasses.asdict(load_config(RECIPE))
    assert {s: set(keys) for s, keys in tree.items()} | {"paths": set(config["paths"])} == {
        s: set(keys) for s, keys in config.items()
    }


def test_the_embedded_recipe_is_the_full_one_but_for_sizes_rates_batch_and_n():
    full, small = load_config(RECIPE), load_config("configs/FLUX/flux_senseflow_tiny.yaml")
    changed = {line.partition(":")[0] for line in differences(full, small)}
    method = ("anchors", "dmd", "ida", "isg", "student", "backward_simulation", "fake_score")
    assert {key for key in changed if key.startswith(method)} == {"fake_score.ttur"}
    assert {key for key in changed if key.startswith("adversarial")} == {"adversarial.taps"}
    rates = {"optimizer.lr", "optimizer.fake_score_lr", "optimizer.discriminator_lr"}
    assert {key for key in changed if key.startswith("optimizer")} == rates


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__iter_nmu": 3}, r"unknown key train.iter_nmu.*train.iter_num"),
        ({"dmd__wieght": 1.0}, r"unknown key dmd.wieght.*dmd.weight"),
        ({"train__iter_num": "many"}, r"train.iter_num: expected int, got 'many'"),
        ({"train__iter_num": 1.5}, r"train.iter_num: expected int"),
        ({"train__deterministic": "on "}, r"train.deterministic: expected bool"),
        ({"train__seed": True}, r"train.seed: expected int, got True"),
        ({"optimizer__lr": "fast"}, r"optimizer.lr: expected float"),
        ({"optimizer__betas": [0.9]}, r"optimizer.betas: expected a list of 2"),
        ({"anchors__times": [1000, "x"]}, r"anchors.times\[1\]: expected float"),
        ({"dmd__time": "gaussian"}, r"dmd.time: 'gaussian' is none of uniform, logit_normal"),
        ({"dmd__guidance": [8, 1]}, r"dmd.guidance: \[8.0, 1.0\] is not \[low, high\]"),
        ({"ida__lam": 1.5}, r"ida.lam: 1.5 is not in \[0, 1\]"),
        ({"backward_simulation__probability": 2}, r"probability: 2.0 is not in"),
        ({"fake_score__ttur": 0}, r"fake_score.ttur must be at least 1"),
        ({"train__iter_num": ...}, r"missing key train.iter_num"),
        ({"lr_scheduler__warmup_iterations": 99999}, r"lr_scheduler: warm-up and decay take 99999"),
        (
            {"dmd__weight": 0, "isg__weight": 0, "adversarial__weight": 0},
            r"the generator has no loss",
        ),
    ],
)
def test_bad_values_are_named_with_file_and_key(tmp_path, changes, message):
    file = edited(tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as error:
        load_config(file)
    assert "edited.yaml" in str(error.value)


def test_files_that_are_no_config(tmp_path):
    with pytest.raises(ValueError, match=r"not found: .*nowhere.yaml"):
        load_config(tmp_path / "nowhere.yaml")
    (tmp_path / "a.yaml").write_text("train: [")
    with pytest.raises(ValueError, match=r"a.yaml is not valid YAML"):
        load_config(tmp_path / "a.yaml")
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
    with pytest.raises(ValueError, match="seed is not a section"):
        load_config(RECIPE, ["train.seed.x=1"])


def test_resolved_config_reads_back_the_same(tmp_path):
    config = load_config(RECIPE, ["train.seed=3"])
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    other = load_config(RECIPE, ["train.seed=4"])
    assert differences(config, other) == ["train.seed: 3 -> 4"]


def test_sizes_may_be_one_number_or_two():
    assert load_config(RECIPE, ["train.resolution=[512, 768]"]).train.resolution == (512, 768)
    assert isinstance(load_config(RECIPE), Config)
