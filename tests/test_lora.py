"""LoRA runs: where they are full training, resume, the student on stock pipelines, errors."""

import json
import shutil
import subprocess
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import short_runs
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file
from short_runs import write_pictures
from student_networks import load_network
from training_runs import environment, full_state, interrupted, line, timeless_rows, train

from senseflow.config.config import Config, load_config
from senseflow.config.recipes import RECIPES
from senseflow.distill.algorithm import train_iteration
from senseflow.distill.measures import Measures
from senseflow.distill.state import denoise, denoise_guided, times
from senseflow.engine.build import check_networks
from senseflow.engine.inputs import read_run
from senseflow.engine.loop import Run
from senseflow.export import __main__ as export_command
from senseflow.extract_lora import __main__ as extract_lora
from senseflow.sampling.drawing import Paths
from senseflow.sampling.model import find_model
from senseflow.weights.card import read_card
from senseflow.weights.stored import LORA_FILE

SHORT = ("train.iter_num=4", "train.log_interval=1", "fake_score.ttur=2", "ida.lam=0.9")
LORA = ("lora.rank=4", "lora.alpha=8")
ALONE = ("adversarial.weight=0",)
BASE = Path("assets/tiny/flux/pipeline")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("data"))


def configure(data: Path, *overrides: str, recipe: str = "flux_senseflow") -> Config:
    return short_runs.configure(data, *SHORT, *overrides, recipe=recipe)


def begin(config: Config, folder: Path) -> Run:
    check_networks(read_run(config, RECIPES[config.recipe].family))
    return short_runs.begin(config, folder)


def finish(config: Config, folder: Path) -> Run:
    return short_runs.finish(begin(config, folder))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return getattr(tensor, "full_tensor", lambda: tensor)().detach().clone()


def state(run: Run) -> dict[str, torch.Tensor]:
    """Every tensor of base, adapters, and optimizers."""
    tensors = {f"base.{k}": v for k, v in run.parts.teacher.base.network.state_dict().items()}
    for name, part in run.trained.items():
        tensors |= {f"{name}.{k}": v for k, v in part.network.state_dict().items()}
        for i, values in part.optimizer.state_dict()["state"].items():
            tensors |= {f"{name}_optimizer.{i}.{k}": v for k, v in values.items()}
    return {k: whole(v) for k, v in tensors.items()}


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    names = (k for k in after if k not in before or not torch.equal(before[k], after[k]))
    return {name.split(".")[0] for name in names if "base_layer" not in name} | {
        "the base" for k in before if ".lora_" not in k and k.startswith("base.")
        and not torch.equal(before[k], after[k])
    }  # fmt: skip


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Run:
    """Four iterations, two updates of the generator."""
    return finish(configure(data, *LORA, *ALONE), tmp_path_factory.mktemp("lora") / "run")


@pytest.mark.parametrize(
    "recipe",
    ["sd35_senseflow", pytest.param("sdxl_senseflow", marks=pytest.mark.long), "sdxl_dmd2"],
)
def test_the_first_iteration_is_that_of_full_training(data, tmp_path, recipe):
    """Up to the first step a student that is its teacher's adapter is the full student: the same
    losses, to the bit."""
    alone = () if recipe == "sdxl_dmd2" else ALONE
    first = ("fake_score.ttur=1", "ida.lam=null", *alone)
    rows = []
    for kind, overrides in (("full", ()), ("lora", LORA)):
        run = begin(configure(data, *first, *overrides, recipe=recipe), tmp_path / kind)
        measures = Measures()
        pictures = train_iteration(run.parts, next(run.data(1)), 1, measures)
        rows.append((measures.read(run.ranks), pictures))
    (full, x), (lora, y) = rows
    losses = {key for key in full if key.startswith("loss/")}
    assert {"loss/dmd", "loss/fake"} <= losses == {key for key in lora if key.startswith("loss/")}
    assert {k: lora[k] for k in losses} == {k: full[k] for k in losses}
    assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


def test_who_moves(data, tmp_path):
    run = begin(configure(data, *LORA, recipe="sdxl_dmd2"), tmp_path / "run")
    batches = run.data(1)
    for iteration in (1, 2, 3, 4):
        before = state(run)
        train_iteration(run.parts, next(batches), iteration, Measures())
        names = {name.removesuffix("_optimizer") for name in moved(before, state(run))}
        expected = {"fake_score"} | ({"generator"} if iteration % 2 == 0 else set())
        assert names - {"base"} == expected | {"discriminator"}
    assert not any(p.grad is not None for p in run.parts.teacher.base.network.parameters())


def test_a_flux_student_begins_as_its_teacher_at_the_constant_guidance(data, tmp_path):
    run = begin(configure(data, *LORA, *ALONE, "student.guidance=5"), tmp_path / "run")
    d, x = run.parts, torch.randn(2, *run.parts.adapter.latent_shape())
    cond, t = d.adapter.encode_prompts(["a red seven", "a blue two"]), times(700.0, 2)
    with torch.no_grad():
        student, fake = (
            denoise(d, part.network, x, t, cond).x_0 for part in (d.generator, d.fake_score)
        )
        teacher = denoise_guided(d, x, t, cond, torch.full((2,), 5.0)).x_0
        other = denoise_guided(d, x, t, cond, torch.full((2,), 3.5)).x_0
    assert torch.equal(student, teacher) and torch.equal(fake, teacher)
    assert not torch.equal(other, teacher)
    assert run.export.card.guidance == 5


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param((), id="B", marks=pytest.mark.long),
        pytest.param(("lora.train=AB", "ema.decay=0.5"), id="AB"),
        pytest.param(("lora.base=int8",), id="int8", marks=pytest.mark.long),
        pytest.param(("lora.base=nf4",), id="nf4"),
    ],
)
def test_resume_is_bit_identical(data, tmp_path, overrides):
    config = configure(data, *LORA, *ALONE, *overrides)
    run = finish(config, tmp_path / "run")
    copy = interrupted(run.folder, 2, tmp_path / "copy")
    again = finish(config, copy)
    one, two = state(run), state(again)
    assert one.keys() == two.keys() and [k for k in one if not torch.equal(one[k], two[k])] == []
    assert timeless_rows(copy) == timeless_rows(run.folder)
    name = f"student/step_0000004/{LORA_FILE}"
    mine, theirs = load_file(run.folder / name), load_file(copy / name)
    assert all(torch.equal(mine[k], theirs[k]) for k in mine)
    if "ema.decay=0.5" in overrides:
        average = load_file(run.folder / "ema" / "step_0000004" / LORA_FILE)
        assert average.keys() == mine.keys() and any(
            not torch.equal(average[k], mine[k]) for k in mine
        )


def test_heads_in_few_bits_learn_and_resume_to_the_bit(data, tmp_path):
    """Beside adapters that stay float32."""
    few = ("precision.head_masters=bfloat16", "optimizer.head_states=8bit", "lora.base=nf4")
    config = configure(data, *LORA, *few, "optimizer.discriminator_lr=1e-3")
    run = begin(config, tmp_path / "run")
    before = state(run)
    after = state(short_runs.finish(run))
    heads = {k for k in before if k.startswith("discriminator.") and before[k].is_floating_point()}
    learn = {k for k in heads if after[k].dtype == torch.bfloat16}
    assert {k.removeprefix("discriminator.") for k in learn} == {
        k for k, _ in run.trained["discriminator"].network.named_parameters()
    }
    moved = sum(not torch.equal(before[k], after[k]) for k in learn)
    assert moved > 0.9 * len(learn)
    kinds = {
        name: {str(v.dtype) for k, v in after.items() if k.startswith(f"{name}_optimizer.")}
        for name in run.trained
    }
    assert "torch.uint8" in kinds["discriminator"]
    assert kinds["generator"] == kinds["fake_score"] == {"torch.float32"}
    copy = interrupted(run.folder, 2, tmp_path / "copy")
    again = state(finish(config, copy))
    assert again.keys() == after.keys()
    assert [k for k in after if not torch.equal(after[k], again[k])] == []


def test_another_form_of_the_base_is_refused_unless_asked_for(data, trained, tmp_path):
    """By the run, by the launcher, and of adapters that it begins with."""
    folder = tmp_path / "run"
    shutil.copytree(trained.folder, folder)
    packed = (*LORA, *ALONE, "lora.base=int8")
    said = r"^lora.base int8: the adapters in \S+ were trained on a base in bfloat16, .*change_base"
    with pytest.raises(ValueError, match=said):
        finish(configure(data, *packed), folder)
    with pytest.raises(ValueError, match=said):
        begin(configure(data, *packed, f"paths.initial={folder}"), tmp_path / "new")
    with pytest.raises(ValueError, match=said):
        begin(configure(data, *packed, f"paths.initial={folder}/student"), tmp_path / "new")
    script = line("flux_senseflow", folder, f"paths.dataset={data}", *short_runs.SHORT, *packed)
    refused = subprocess.run(script, capture_output=True, text=True, env=environment())
    assert refused.returncode == 1 and "lora.base int8: the adapters in" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
    longer = ("lora.change_base=true", "train.iter_num=5")
    finish(configure(data, *packed, *longer), folder)
    assert load_config(folder / "config.yaml").lora.base == "int8"
    assert (folder / "last_iter").read_text().strip() == "5"


def test_the_student_of_a_packed_base_is_that_base_and_its_adapters(data, tmp_path):
    """In training, drawn by its card, fused in a pipeline: W as unpacked, and B A."""
    run = finish(configure(data, *LORA, *ALONE, "lora.base=nf4"), tmp_path / "run")
    assert read_card(run.folder / "student" / "step_0000004").base_form == "nf4"
    paths = Paths(base=BASE, checkpoint=run.folder)
    drawn = find_model(RECIPES["flux_senseflow"].family, paths).build(torch.float32)
    output = tmp_path / "pipeline"
    command = [str(run.folder), "--form", "pipeline", "--output", str(output)]
    assert export_command.main(command) == 0
    fused = load_file(output / "transformer" / "diffusion_pytorch_model.safetensors")
    whole_base = load_file(BASE / "transformer" / "diffusion_pytorch_model.safetensors")
    factors = {k: whole(v) for k, v in run.parts.generator.network.state_dict().items()}
    for key, weight in whole_base.items():
        layer = key.removesuffix(".weight")
        expected = weight.float()
        if "transformer_blocks." in key and key.endswith(".weight") and weight.ndim == 2:
            expected = bnb.dequantize_4bit(*bnb.quantize_4bit(expected, quant_type="nf4"))
        if f"{layer}.lora_A.weight" in factors:
            a, b = (factors[f"{layer}.lora_{f}.weight"] for f in "AB")
            expected = expected + 2.0 * b @ a
        torch.testing.assert_close(fused[key], expected, rtol=0, atol=1e-6)
    assert "nf4" in (output / "README.md").read_text()
    student = load_network(output / "transformer")
    d, x = run.parts, torch.randn(2, *run.parts.adapter.latent_shape())
    cond, t = d.adapter.encode_prompts(["a red seven", "a blue two"]), times(700.0, 2)
    with torch.no_grad():
        one, two, three = (
            denoise(d, network, x, t, cond).x_0 for network in (d.generator.network, drawn, student)
        )
    torch.testing.assert_close(two, one, rtol=0, atol=1e-5)
    torch.testing.assert_close(three, one, rtol=0, atol=1e-5)


def test_what_a_checkpoint_holds(trained, tmp_path):
    held = full_state(trained.folder, 4, tmp_path)
    assert {key.split(".")[0] for key in held} == {"generator", "fake_score"}
    assert all(".lora_" in key or key.endswith("step") for key in held if ".network." in key)
    sizes = sum(v.numel() for k, v in held.items() if ".network." in k)
    base = sum(p.numel() for p in trained.parts.teacher.base.network.parameters())
    assert sizes < 0.6 * base


def draw(pipeline, guidance: float) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(
        pipeline.scheduler.config, stochastic_sampling=False
    )
    latents = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(0))
    return pipeline(
        prompt=["a red seven", "a blue two"],
        num_inference_steps=2,
        guidance_scale=guidance,
        height=32,
        width=32,
        latents=latents,
        max_sequence_length=12,
        output_type="pt",
    ).images


def test_a_stock_pipeline_draws_the_students_images(trained):
    folder = trained.folder / "student" / "step_0000004"
    stock = DiffusionPipeline.from_pretrained(BASE)
    teachers = draw(stock, 3.5)
    stock.load_lora_weights(folder)
    images = draw(stock, 3.5)
    assert (images - teachers).abs().max() > 1e-3
    # the same by hand: effective weights, in a network without adapters
    by_hand = DiffusionPipeline.from_pretrained(BASE)
    factors = trained.parts.generator.network.state_dict()
    with torch.no_grad():
        for key, a in factors.items():
            if key.endswith("lora_A.weight"):
                layer = key.removesuffix(".lora_A.weight")
                b = whole(factors[f"{layer}.lora_B.weight"])
                by_hand.transformer.get_submodule(layer).weight += 2.0 * b @ whole(a)
    torch.testing.assert_close(draw(by_hand, 3.5), images, rtol=0, atol=2e-4)
    # and by this package's own way to load a student
    own = DiffusionPipeline.from_pretrained(BASE)
    own.transformer = load_network(trained.folder, base=BASE / "transformer")
    assert torch.equal(draw(own, 3.5), images)
    card = read_card(folder)
    assert card.guidance == 3.5 and card.family == "flux"


def test_export_writes_the_same_file(trained, tmp_path, capsys):
    output = tmp_path / "lora"
    assert export_command.main([str(trained.folder), "--output", str(output)]) == 0
    mine, theirs = (
        load_file(f / LORA_FILE) for f in (output, trained.folder / "student" / "step_0000004")
    )
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)
    assert not (output / "config.json").exists()


def test_extraction_at_full_rank_is_the_student(data, tmp_path, caplog):
    full = finish(configure(data, *ALONE, "train.iter_num=2", recipe="sd35_senseflow"), tmp_path)
    student, base = full.folder / "student", Path("assets/tiny/sd35_medium/pipeline")
    arguments = ["--base", str(base), "--student", str(student), "--rank"]
    caplog.set_level("INFO")
    assert extract_lora.main([*arguments, "64", "--output", str(tmp_path / "whole")]) == 0
    assert extract_lora.main([*arguments, "1", "--output", str(tmp_path / "one")]) == 0
    skipped = [*arguments, "1", "--output", str(tmp_path / "less"), "--skip"]
    assert extract_lora.main([*skipped, "nothing"]) == 2
    assert extract_lora.main([*skipped, "norm_out.linear", "proj"]) == 0
    one, less = (load_file(tmp_path / name / LORA_FILE).keys() for name in ("one", "less"))
    gone = {key.rpartition(".lora_")[0].removeprefix("transformer.") for key in one - less}
    assert len(less) < len(one) and "norm_out.linear" in gone
    assert all(layer == "norm_out.linear" or layer.endswith(".proj") for layer in gone)
    for again in (str(tmp_path / "one"), str(tmp_path / "new")):
        lora = ["--base", str(base), "--student", str(tmp_path / "one"), "--rank", "1"]
        assert extract_lora.main([*lora, "--output", again]) == 2
    kept = [float(r.message.split(" keeps ")[1].split(" %")[0]) for r in caplog.records
            if " keeps " in r.message]  # fmt: skip
    assert kept[0] > 60 > kept[1] > 0  # biases and norms are the rest of the first
    network = load_network(tmp_path / "whole", base=base / "transformer")
    wanted = load_network(student)
    before = load_network(base / "transformer")
    layers = dict(network.named_modules())
    for name, module in wanted.named_modules():
        if isinstance(module, torch.nn.Linear):
            found = layers[name]
            delta = found.get_delta_weight("default_0")
            change = module.weight - before.get_submodule(name).weight
            torch.testing.assert_close(delta, change, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("lora.rank=0",), "lora.rank 0 must be"),
        (("lora.alpha=0",), "lora.alpha 0.0 must be above 0"),
        (("lora.targets=[]",), "lora.targets is empty"),
        (("lora.targets=[to_q, to_x]",), "lora.targets: to_x is no linear layer"),
        (("lora.train=A",), "lora.train: 'A' is none of B, AB"),
        (("lora.base=int4",), "lora.base: 'int4' is none of bfloat16, int8, nf4"),
        (("lora.base=nf4", "lora.rank=null"), "lora.base nf4: in full training every weight"),
        (("precision.masters=bfloat16",), "precision.head_masters, optimizer.head_states"),
        (("parallel.offload=trained",), "none or heads for parallel.offload"),
        (("student.guidance=null",), "student.guidance is missing"),
        (("student.fold_guidance=3.5",), "a LoRA student keeps the guidance embedding"),
        (("paths.student_config=x.json",), "say null for paths.student_config"),
        (("paths.initial=assets/tiny/flux/pipeline",), "is no LoRA that this run can go on from"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_loaded(data, overrides, said):
    with pytest.raises(ValueError, match=said):
        config = configure(data, *LORA, *overrides)
        check_networks(read_run(config, RECIPES[config.recipe].family))


def b_of(state: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [whole(value) for key, value in state.items() if ".lora_B." in key]


def test_a_run_goes_on_from_another_loras_adapters(data, trained, tmp_path):
    initial = f"paths.initial={trained.folder}"
    run = begin(configure(data, *LORA, *ALONE, initial, "train.seed=5"), tmp_path / "a")
    for name in ("generator", "fake_score"):
        mine, theirs = (r.trained[name].network.state_dict() for r in (run, trained))
        assert all(torch.equal(whole(mine[k]), whole(theirs[k])) for k in theirs)
    student = f"paths.initial={trained.folder / 'student'}"
    alone = begin(configure(data, *LORA, *ALONE, student, "train.seed=5"), tmp_path / "b")
    mine = alone.parts.generator.network.state_dict()
    theirs = trained.parts.generator.network.state_dict()
    assert all(torch.equal(whole(mine[k]), whole(theirs[k])) for k in theirs)
    family = RECIPES["flux_senseflow"].family
    other = begin(configure(data, *LORA, *ALONE, student, "lora.alpha=2"), tmp_path / "c")
    products = (r.trained["generator"].network.state_dict() for r in (other, trained))
    for mine, theirs in ((0.5 * x, 2.0 * y) for x, y in zip(*map(b_of, products), strict=True)):
        assert torch.equal(mine, theirs)  # a student's scale is the run's: B is as much larger
    for other in ("lora.alpha=4", "lora.train=AB"):
        with pytest.raises(ValueError, match=r"its lora\.train or its scale"):
            check_networks(read_run(configure(data, *LORA, *ALONE, initial, other), family))
    with pytest.raises(ValueError, match="of another shape"):
        check_networks(read_run(configure(data, *ALONE, initial, "lora.rank=8"), family))


def test_the_recipe_for_one_gpu_is_the_published_one_but_for_lora():
    lora, full = (load_config(f"configs/FLUX/flux_senseflow{s}.yaml") for s in ("_lora", ""))
    assert (lora.lora.rank, lora.lora.train, lora.lora.targets) == (64, "B", full.lora.targets)
    assert (lora.train.batch_size, lora.train.grad_accumulation) == (8, 8)
    for section in ("anchors", "dmd", "ida", "isg", "adversarial", "fake_score", "student"):
        assert getattr(lora, section) == getattr(full, section)


@pytest.mark.long
def test_two_ranks_take_the_steps_of_one(data, tmp_path):
    recomputed = "parallel.activation_checkpointing=1"
    overrides = (f"paths.dataset={data}", *short_runs.SHORT, *SHORT, *LORA, *ALONE, recomputed)
    states = []
    for ranks in (1, 2):
        train("flux_senseflow", tmp_path / str(ranks), *overrides, ranks=ranks)
        (tmp_path / f"state{ranks}").mkdir()
        states.append(full_state(tmp_path / str(ranks), 4, tmp_path / f"state{ranks}"))
    one, two = states
    for name in ("generator", "fake_score"):
        keys = [k for k in one if k.startswith(f"{name}.network.") and "lora_B" in k]
        apart = sum(float((one[k] - two[k]).square().sum()) for k in keys) ** 0.5
        far = sum(float(one[k].square().sum()) for k in keys) ** 0.5
        assert apart < 5e-3 * far, json.dumps([name, apart, far])
