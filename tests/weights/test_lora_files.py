"""LoRA files in every form that people have, and which layers clients know by which names.

The expected update of a layer is (alpha / rank) B A by its definition. Networks are the small ones
of lora_parts.py, and the full-size ones by shapes alone.
"""

import json
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.loaders.lora_conversion_utils import _convert_xlabs_flux_lora_to_diffusers
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from lora_clients import comfyui, invokeai, stable_diffusion_cpp
from lora_parts import CASES
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from senseflow.common.files import ROOT, read_json
from senseflow.config.config import load_config
from senseflow.config.families import family_of
from senseflow.config.recipes import FAMILIES
from senseflow.engine.export import Layout, fill_component
from senseflow.teachers.family import Family
from senseflow.teachers.flux.original import adapter
from senseflow.teachers.original import OriginalNames
from senseflow.teachers.sdxl.original import layer_name
from senseflow.teachers.weights import adapted, lora_key
from senseflow.weights.lora_files import METADATA, Component, Lora, is_lora, read_lora, written_key
from senseflow.weights.original import inverse, planned, to_diffusers
from senseflow.weights.stored import LORA_FILE, Weights
from senseflow.weights.student import open_lora

OF = {
    "flux": "FluxPipeline",
    "sd35": "StableDiffusion3Pipeline",
    "sdxl": "StableDiffusionXLPipeline",
}
RANK = 4
Pairs = dict[str, tuple[Tensor, Tensor, float]]  # A, B and alpha by layer


def layers_of(network: nn.Module) -> dict[str, torch.Size]:
    kinds = nn.Linear | nn.Conv2d
    return {n: m.weight.shape for n, m in network.named_modules() if isinstance(m, kinds)}


@cache
def component(name: str) -> Component:
    """A small network, by its shapes."""
    with torch.device("meta"):
        network = CASES[name].make()
    kohya = partial(layer_name, config=dict(network.config)) if name == "sdxl" else None
    return Component("unet" if kohya else "transformer", layers_of(network), kohya)


@cache
def published(family: Family) -> nn.Module:
    """Its full-size network, without memory."""
    with torch.device("meta"):
        return getattr(diffusers, family.network_class).from_config(family.published.denoiser)


def full_size(family: Family) -> Component:
    """The published network, by its shapes."""
    kohya = partial(layer_name, config=family.published.denoiser)
    shapes = layers_of(published(family))
    return Component(family.component, shapes, kohya if family.name == "sdxl" else None)


def pairs_of(shapes: dict[str, torch.Size], alphas: Callable[[int], float]) -> Pairs:
    """Random factors of every layer; alphas: by the layer's number."""
    draw = torch.Generator().manual_seed(0)
    pairs = {}
    for number, (layer, shape) in enumerate(shapes.items()):
        a = torch.randn(RANK, *shape[1:], generator=draw)
        b = torch.randn(shape[0], RANK, *(1,) * (len(shape) - 2), generator=draw)
        pairs[layer] = (a, b, alphas(number))
    return pairs


def product(a: Tensor, b: Tensor) -> Tensor:
    return b.flatten(1).double() @ a.flatten(1).double()


def check(lora: Lora, of: str, pairs: Pairs) -> None:
    """Every layer's B A is what the file meant."""
    lora.require_all()
    found = lora.of(of)
    assert found.keys() == {f"{layer}.lora_{f}.weight" for layer in pairs for f in "AB"}
    for layer, (a, b, alpha) in pairs.items():
        mine = product(*(found[f"{layer}.lora_{f}.weight"] for f in "AB"))
        torch.testing.assert_close(mine, alpha / RANK * product(a, b), rtol=1e-6, atol=1e-6)


def written(names: Callable[[str], str], down: str, up: str, pairs: Pairs) -> dict[str, Tensor]:
    """Tensors with alpha as a tensor of its own."""
    tensors = {}
    for layer, (a, b, alpha) in pairs.items():
        tensors |= {names(layer) + down: a, names(layer) + up: b}
        tensors[f"{names(layer)}.alpha"] = torch.tensor(alpha)
    return tensors


def flat(prefix: str) -> Callable[[str], str]:
    return lambda layer: f"{prefix}_{layer.replace('.', '_')}"


KOHYA = (".lora_down.weight", ".lora_up.weight")
PEFT = (".lora_A.weight", ".lora_B.weight")
FORMS = {
    "diffusers": lambda c: (lambda layer: f"{c.name}.{layer}", *PEFT),
    "peft": lambda c: (lambda layer: f"base_model.model.{layer}", *PEFT),
    "kohya with diffusers' names": lambda c: (flat("lora_unet"), *KOHYA),
    "OneTrainer": lambda c: (flat("lora_transformer"), *KOHYA),
    "LyCORIS": lambda c: (flat("lycoris"), *KOHYA),
}
ALPHAS = {
    "below": lambda number: 1.0,
    "at": lambda number: 4.0,
    "above": lambda number: 12.0,
    "by layer": lambda number: number % 3 + 1.0,
}


@pytest.mark.parametrize("name", CASES)
def test_every_form_is_the_same_adapters(name, tmp_path):
    part = component(name)
    pairs = pairs_of(part.shapes, ALPHAS["by layer"])
    for form in FORMS.values():
        save_file(written(*form(part), pairs), tmp_path / "lora.safetensors")
        check(read(tmp_path / "lora.safetensors", part), part.name, pairs)


def read(file: Path, part: Component) -> Lora:
    weights = open_lora(file)
    assert is_lora(weights.keys)
    return read_lora(weights, [part])


def test_sdxl_by_its_authors_names_and_by_diffusers_older_ones(tmp_path):
    part = component("sdxl")
    pairs = pairs_of(part.shapes, ALPHAS["by layer"])
    names = lambda layer: "lora_unet_" + part.kohya(layer).replace(".", "_")  # noqa: E731
    older = lambda layer: "unet." + layer.replace(".to_", ".processor.to_").replace("to_out.0", "to_out")  # noqa: E731,E501  # fmt: skip
    forms = {"kohya": (names, *KOHYA), "older": (older, ".lora.down.weight", ".lora.up.weight")}
    for form, words in forms.items():
        save_file(written(*words, pairs), tmp_path / f"{form}.safetensors")
        check(read(tmp_path / f"{form}.safetensors", part), "unet", pairs)
    processors = {k.replace(".lora.", "_lora.") if ".to_" in k else k: v
                  for k, v in load_file(tmp_path / "older.safetensors").items()}  # fmt: skip
    kept = {k: v for k, v in processors.items() if "alpha" not in k}
    save_file(kept, tmp_path / "processors.safetensors")
    plain = {layer: (a, b, float(RANK)) for layer, (a, b, _) in pairs.items()}
    check(read(tmp_path / "processors.safetensors", part), "unet", plain)


def test_the_names_of_sdxls_authors_are_those_that_diffusers_converts():
    network = published(next(f for f in FAMILIES if f.name == "sdxl"))
    config = dict(network.config)
    keys = [key.rpartition(".") for key in network.state_dict()]
    theirs = {f"model.diffusion_model.{layer_name(m, config)}.{p}": f"{m}.{p}" for m, _, p in keys}
    found = convert_ldm_unet_checkpoint(dict(theirs), config)
    assert len(theirs) == len(keys) and {k: v for k, v in found.items() if k != v} == {}
    assert found.keys() == {f"{m}.{p}" for m, _, p in keys}


def test_the_scale_in_a_header_is_peft_s_own(tmp_path):
    """Patterns of ranks and alphas, as peft itself scales by them."""
    with torch.random.fork_rng(devices=[]):
        network = CASES["flux"].make()
        config = LoraConfig(
            r=4, lora_alpha=6, target_modules=["to_q", "proj_out"], init_lora_weights=False,
            rank_pattern={"single_transformer_blocks.0.proj_out": 2}, alpha_pattern={"to_q": 1},
        )  # fmt: skip
        inject_adapter_in_model(config, network)
    facts = {k: getattr(config, k) for k in ("r", "lora_alpha", "rank_pattern", "alpha_pattern")}
    state = get_peft_model_state_dict(network)
    header = {METADATA: json.dumps({f"transformer.{k}": v for k, v in facts.items()})}
    save_file({f"transformer.{k}": v.contiguous() for k, v in state.items()},
              tmp_path / "a.safetensors", header)  # fmt: skip
    lora = read(tmp_path / "a.safetensors", component("flux"))
    lora.require_all()
    (tmp_path / "peft").mkdir()
    save_file({f"base_model.model.{k}": v.contiguous() for k, v in state.items()},
              tmp_path / "peft" / "adapter_model.safetensors")  # fmt: skip
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(facts))
    beside = read(tmp_path / "peft" / "adapter_model.safetensors", component("flux"))
    layers = {key.rpartition(".lora_")[0] for key in state}
    assert len(layers) > 3
    for layer in layers:
        delta = network.get_submodule(layer).get_delta_weight("default")
        for found in (lora, beside):
            mine = product(*(found.of("transformer")[f"{layer}.lora_{f}.weight"] for f in "AB"))
            torch.testing.assert_close(mine.float(), delta.flatten(1), rtol=1e-5, atol=1e-6)


def test_a_scale_that_bfloat16_cannot_hold_is_not_rounded_into_it(tmp_path):
    layer = "transformer_blocks.0.attn.to_q"
    a, b = (torch.ones(3, 64).bfloat16(), torch.full((64, 3), 1.0).bfloat16())
    for alpha, dtype in ((1.0, torch.float32), (6.0, torch.bfloat16)):
        tensors = {f"transformer.{layer}.lora_A.weight": a, f"transformer.{layer}.lora_B.weight": b}
        tensors[f"transformer.{layer}.alpha"] = torch.tensor(alpha)
        save_file(tensors, tmp_path / "a.safetensors")
        part = Component("transformer", {layer: torch.Size((64, 64))})
        found = read(tmp_path / "a.safetensors", part).of("transformer")
        assert {value.dtype for value in found.values()} == {dtype}
        assert torch.equal(found[f"{layer}.lora_B.weight"].float(), b.float() * (alpha / 3))


def by_authors(network: nn.Module, names: OriginalNames) -> Component:
    config = dict(network.config)
    authors = partial(to_diffusers, network, lambda key: names.name(key, config), names.prefix)
    return Component("transformer", layers_of(network), None, authors)


def deltas(part: Component, sizes: dict[str, tuple[int, int]]) -> tuple[Lora, dict[str, Tensor]]:
    """Adapters of rank 1 and scale 1/2 of layers in kohya's form, read; and what each of them makes
    of one input."""
    draw = torch.Generator().manual_seed(0)
    tensors, wanted = {}, {}
    for name, (inputs, outputs) in sizes.items():
        a, b = torch.randn(1, inputs, generator=draw), torch.randn(outputs, 1, generator=draw)
        words = {".lora_down.weight": a, ".lora_up.weight": b, ".alpha": torch.tensor(0.5)}
        tensors |= {f"lora_unet_{name}{end}": value for end, value in words.items()}
        wanted[name] = 0.5 * b @ (a @ torch.linspace(-1, 1, inputs))
    weights = Weights(Path("lora.bin"), list(tensors), lambda key: tensors[key])
    return read_lora(weights, [part]), wanted


def check_rows(lora: Lora, wanted: dict[str, Tensor]) -> None:
    """Every layer, and no other, makes of that input what it is to make."""
    lora.require_all()
    found = lora.of("transformer")
    assert found.keys() == {f"{layer}.lora_{f}.weight" for layer in wanted for f in "AB"}
    for layer, rows in wanted.items():
        a, b = (found[f"{layer}.lora_{f}.weight"] for f in "AB")
        mine = b.flatten(1) @ (a.flatten(1) @ torch.linspace(-1, 1, a[0].numel()))
        torch.testing.assert_close(mine, rows, rtol=1e-4, atol=1e-4)


def turned(rows: Tensor) -> Tensor:
    """Shift and scale have changed places."""
    return torch.cat(rows.chunk(2)[::-1])


def test_flux_by_its_authors_names():
    """Fused layers are three or four, and what is outside of the blocks is there: full size."""
    family = next(f for f in FAMILIES if f.name == "flux")
    part = by_authors(published(family), family.original)
    sizes = {
        "double_blocks_0_img_attn_qkv": (3072, 9216),
        "single_blocks_37_linear1": (3072, 21504),
        "double_blocks_18_txt_mlp_2": (12288, 3072),
        "final_layer_adaLN_modulation_1": (3072, 6144),
        "txt_in": (4096, 3072),
        "guidance_in_in_layer": (256, 3072),
    }
    lora, made = deltas(part, sizes)
    single = "single_transformer_blocks.37"
    fused = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    parts = made["single_blocks_37_linear1"].split([3072, 3072, 3072, 12288])
    wanted = {f"{single}.{layer}": rows for layer, rows in zip(fused, parts, strict=True)}
    parts = made["double_blocks_0_img_attn_qkv"].split(3072)
    wanted |= {f"transformer_blocks.0.{fused[n]}": rows for n, rows in enumerate(parts)}
    wanted |= {
        "transformer_blocks.18.ff_context.net.2": made["double_blocks_18_txt_mlp_2"],
        "norm_out.linear": turned(made["final_layer_adaLN_modulation_1"]),
        "context_embedder": made["txt_in"],
        "time_text_embed.guidance_embedder.linear_1": made["guidance_in_in_layer"],
    }
    check_rows(lora, wanted)


EMBEDDED = ["flux", "flux2_klein", "sd35_medium", "sd35_large", "sdxl", "z_image", "qwen_image"]
BY_AUTHORS = {
    "diffusion_model": ("diffusion_model.{}", ".lora_A.weight", ".lora_B.weight", None),
    "with alpha": ("diffusion_model.{}", ".lora_A.weight", ".lora_B.weight", ".alpha"),
    "down and up": ("diffusion_model.{}", ".lora_down.weight", ".lora_up.weight", ".alpha"),
    "kohya": ("lora_unet_{}", ".lora_down.weight", ".lora_up.weight", ".alpha"),
}


def embedded(name: str) -> tuple[Family, Path]:
    base = ROOT / "assets" / "tiny" / name / "pipeline"
    return family_of(base, "base"), base


@pytest.mark.parametrize("name", EMBEDDED)
def test_every_layer_of_every_teacher_is_read_as_it_is_written(name, tmp_path):
    family, base = embedded(name)
    part, key_of = adapted(family, base), lora_key(family, base)
    pairs = pairs_of(part.shapes, lambda _: 1.0 * RANK)
    held = {
        f"{layer}.lora_{factor}.weight": value
        for layer, (a, b, _) in pairs.items()
        for factor, value in (("A", a), ("B", b))
    }
    save_file({key_of(key): value for key, value in held.items()}, tmp_path / "own.safetensors")
    lora = read(tmp_path / "own.safetensors", part)
    lora.require_all()
    found = lora.of(family.component)
    assert found.keys() == held.keys()
    assert all(torch.equal(found[key].flatten(), held[key].flatten()) for key in held)


@pytest.mark.parametrize("name", EMBEDDED)
def test_diffusers_paths_behind_comfyuis_prefix(name, tmp_path):
    """So ai-toolkit writes Z-Image's and Qwen-Image's, which it trains by diffusers' networks."""
    family, base = embedded(name)
    part = adapted(family, base)
    pairs = pairs_of(part.shapes, lambda _: 1.0 * RANK)
    file = tmp_path / "prefixed.safetensors"
    save_file(written(lambda layer: f"diffusion_model.{layer}", *PEFT, pairs), file)
    check(read(file, part), family.component, pairs)


@pytest.mark.parametrize("form", BY_AUTHORS)
@pytest.mark.parametrize("name", ["flux2_klein", "sd35_medium", "sd35_large", "z_image"])
def test_by_authors_names_it_is_what_diffusers_makes_of_the_whole_weights(name, form, tmp_path):
    """diffusers converts B A of the authors' layers, fused ones and turned ones among them."""
    family, base = embedded(name)
    config = dict(read_json(base / family.component / "config.json"))
    with torch.device("meta"):
        network = getattr(diffusers, family.network_class).from_config(config)
    names, own = family.original, network.state_dict()
    back = inverse(to_diffusers(network, lambda key: names.name(key, config), names.prefix))
    held, (called, down, up, alpha) = planned(back, own.__getitem__), BY_AUTHORS[form]
    draw, file, whole = torch.Generator().manual_seed(0), {}, {}
    for key in back:
        shape = held(key).shape
        whole[names.prefix + key] = torch.zeros(shape)
        if not key.endswith(".weight") or len(shape) != 2:
            continue
        layer = key.removesuffix(".weight")
        a = torch.randn(RANK, shape[1], generator=draw)
        b = torch.randn(shape[0], RANK, generator=draw)
        layer = called.format(layer.replace(".", "_") if form == "kohya" else layer)
        file |= {layer + down: a, layer + up: b} | (
            {layer + alpha: torch.tensor(1.0)} if alpha else {}
        )
        whole[names.prefix + key] = b @ a / (RANK if alpha else 1)
    convert = SINGLE_FILE_LOADABLE_CLASSES[family.network_class]["checkpoint_mapping_fn"]
    expected = convert(checkpoint=whole, config=config)
    save_file(file, tmp_path / "theirs.safetensors")
    lora = read(tmp_path / "theirs.safetensors", adapted(family, base))
    lora.require_all()
    found = lora.of(family.component)
    wanted = {k.removesuffix(".weight"): v for k, v in expected.items() if v.count_nonzero() > 0}
    assert found.keys() == {f"{layer}.lora_{f}.weight" for layer in wanted for f in "AB"}
    for layer, update in wanted.items():
        a, b = (found[f"{layer}.lora_{factor}.weight"] for factor in "AB")
        torch.testing.assert_close(b @ a, update, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_flux_by_xlabs_names_is_what_diffusers_makes_of_it(prefix, tmp_path):
    shapes = {layer: shape for layer, shape in component("flux").shapes.items() if adapter(layer)}
    part = Component("transformer", component("flux").shapes, xlabs=adapter)
    wide = shapes["transformer_blocks.0.attn.to_q"][0]
    sizes = {"qkv_lora1": 3 * wide, "qkv_lora2": 3 * wide, "proj_lora1": wide, "proj_lora2": wide}
    names = {f"double_blocks.0.processor.{name}": (wide, out) for name, out in sizes.items()}
    names["single_blocks.0.processor.qkv_lora"] = (wide, 3 * wide)
    names["single_blocks.0.processor.proj_lora"] = (
        shapes["single_transformer_blocks.0.proj_out"][1], wide
    )  # fmt: skip
    held = {
        prefix + name + end: torch.randn(shape)
        for name, (inputs, out) in names.items()
        for end, shape in ((".down.weight", (RANK, inputs)), (".up.weight", (out, RANK)))
    }
    save_file(held, tmp_path / "xlabs.safetensors")
    lora = read(tmp_path / "xlabs.safetensors", part)
    lora.require_all()
    theirs = _convert_xlabs_flux_lora_to_diffusers(dict(held))
    assert lora.tensors.keys() == theirs.keys()
    assert all(torch.equal(lora.tensors[key], theirs[key]) for key in theirs)


def test_sd35_by_its_authors_names():
    """The last block of the text has shift and scale as the last layer; a small network."""
    family = next(f for f in FAMILIES if f.title == "SD3.5 Medium")
    with torch.device("meta"):
        network = CASES["sd35"].make()
    part = by_authors(network, family.original)
    wide = part.shapes["transformer_blocks.0.attn.to_q"][0]
    last = network.config.num_layers - 1
    sizes = {
        "joint_blocks_0_x_block_attn_qkv": (wide, 3 * wide),
        "joint_blocks_0_x_block_attn2_qkv": (wide, 3 * wide),
        f"joint_blocks_{last}_context_block_adaLN_modulation_1": (wide, 2 * wide),
        "y_embedder_mlp_2": (wide, wide),
    }
    lora, made = deltas(part, sizes)
    wanted = {
        f"transformer_blocks.0.{attn}.to_{'qkv'[n]}": rows
        for attn in ("attn", "attn2")
        for n, rows in enumerate(made[f"joint_blocks_0_x_block_{attn}_qkv"].split(wide))
    }
    text = f"joint_blocks_{last}_context_block_adaLN_modulation_1"
    wanted |= {
        f"transformer_blocks.{last}.norm1_context.linear": turned(made[text]),
        "time_text_embed.text_embedder.linear_2": made["y_embedder_mlp_2"],
    }
    check_rows(lora, wanted)
    lora, _ = deltas(part, {"joint_blocks_0_x_block_attn_qkv": (wide, 3 * wide + 1)})
    assert set(lora.lost.values()) == {"of another shape than the network's"}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"lokr_w1": (4, 4), "lokr_w2": (16, 16)}, "of a kind that is not read, LoKr: "),
        ({"hada_w1_a": (64, 4), "hada_w1_b": (4, 64)}, "of a kind that is not read, LoHa: "),
        (
            {"lora_A.weight": (4, 64), "lora_B.weight": (64, 4), "dora_scale": (64, 1)},
            "DoRA in LyC",
        ),
        ({"lora_A.weight": (4, 64)}, "without one of the two factors: "),
        (
            {"lora_A.weight": (4, 3072), "lora_B.weight": (3072, 4)},
            "of another shape than the netw",
        ),
        ({"lora_A.weight": (4, 64), "lora_B.weight": (64, 5)}, "of another shape than the network"),
        ({"diff_b": (64,)}, "of a kind that is not read, whole differences: "),
        ({"weight": (64, 64)}, "of a kind that is not read, no factors: "),
    ],
)
def test_what_is_not_read_is_named(more, said, tmp_path):
    layer = "transformer.transformer_blocks.0.attn"
    good = {"lora_A.weight": torch.ones(4, 64), "lora_B.weight": torch.ones(64, 4)}
    good = {f"{layer}.to_k.{key}": value for key, value in good.items()}
    save_file(good | {f"{layer}.to_q.{k}": torch.ones(shape) for k, shape in more.items()},
              tmp_path / "a.safetensors")  # fmt: skip
    layers = [f"transformer_blocks.0.attn.to_{x}" for x in "qk"]
    part = Component("transformer", {layer: torch.Size((64, 64)) for layer in layers})
    lora = read(tmp_path / "a.safetensors", part)
    assert {k.rpartition(".lora_")[0] for k in lora.tensors} == {f"{layer}.to_k"}
    with pytest.raises(ValueError, match="does not fit: 1 of its 2 layers fit nowhere") as error:
        lora.require_all()
    assert said in str(error.value) and f"{layer}.to_q" in str(error.value)


def test_a_message_does_not_grow_with_the_layers(tmp_path):
    shapes = {f"blocks.{n}": torch.Size((8, 8)) for n in range(400)}
    tensors = written(flat("lora_unet"), *KOHYA, pairs_of(shapes, ALPHAS["at"]))
    save_file(tensors, tmp_path / "a.safetensors")
    lora = read(tmp_path / "a.safetensors", component("flux"))
    assert len(lora.said()) < 300 and lora.said().startswith("400 of its 400 layers fit nowhere")


# What is written, and who reads it


@pytest.mark.parametrize("alphas", ["below", "at", "above"])
@pytest.mark.parametrize("name", CASES)
def test_what_is_written_is_applied_and_fused_alike_by_diffusers(name, alphas, tmp_path):
    """diffusers' own loader of a pipeline puts W + (alpha / rank) B A into the network."""
    case, part = CASES[name], component(name)
    alpha = ALPHAS[alphas](0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network, by_hand = case.make().eval(), case.make().eval()
    by_hand.load_state_dict(network.state_dict())
    pairs = {
        k: (a / 30, b / 30, alpha) for k, (a, b, _) in pairs_of(part.shapes, ALPHAS["at"]).items()
    }
    write(part, pairs, alpha, tmp_path)
    loader = getattr(diffusers, OF[name])
    words = {"unet_config": network.config} if name == "sdxl" else {}
    state = loader.lora_state_dict(tmp_path, **words)
    if name == "sdxl":
        assert state[1] == {}  # alphas of layers
        loader.load_lora_into_unet(state[0], state[1], network)
    else:
        loader.load_lora_into_transformer(state, transformer=network, **(
            {"network_alphas": None} if name == "flux" else {}))  # fmt: skip
    with torch.no_grad():
        for layer, (a, b, _) in pairs.items():
            weight = by_hand.get_submodule(layer).weight
            weight += (alpha / RANK * product(a, b)).float().view_as(weight)
        x = torch.randn(case.sample, generator=torch.Generator().manual_seed(1))
        wanted = case.call(by_hand, x)
        torch.testing.assert_close(case.call(network, x), wanted, rtol=1e-4, atol=1e-4)
        network.fuse_lora()
        for layer in pairs:
            mine = network.get_submodule(layer).get_base_layer().weight
            torch.testing.assert_close(
                mine, by_hand.get_submodule(layer).weight, rtol=1e-5, atol=1e-6
            )


def write(part: Component, pairs: Pairs, alpha: float, folder: Path) -> Path:
    """A file as a run's student and the export write it."""
    state = {
        f"{k}.lora_{f}.weight": v for k, ab in pairs.items() for f, v in zip("AB", ab, strict=False)
    }
    key = partial(written_key, part.name, part.kohya)
    layout = Layout.of_lora(state, torch.float32, key, alpha / RANK)
    fill_component(folder, layout, (layout.written(k, v) for k, v in state.items()))
    check(read_lora(open_lora(folder / LORA_FILE), [part]), part.name, pairs)
    return folder / LORA_FILE


def subset(part: Component, layers: Iterable[str]) -> Component:
    return Component(part.name, {layer: part.shapes[layer] for layer in layers}, part.kohya)


def keys_of(part: Component) -> set[str]:
    factors = (f"{layer}.lora_{f}.weight" for layer in part.shapes for f in "AB")
    return {written_key(part.name, part.kohya, key) for key in factors}


RECIPES_OF = {
    "FLUX.1-dev": "FLUX/flux_senseflow",
    "SDXL": "sdxl/sdxl_senseflow",
    "SD3.5 Medium": "SD35/sd35_senseflow",
    "SD3.5 Large": "SD35/sd35_large_senseflow",
}


@pytest.mark.parametrize(
    ("name", "config", "num"),
    [
        ("z_image", "Z-Image/z_image_senseflow_lora", (30 + 2 + 2) * 7),  # layers, both refiners
        ("qwen_image", "Qwen-Image/qwen_image_senseflow_lora", 60 * 12),
    ],
)
def test_comfyui_knows_every_layer(name, config, num):
    """The rules of the others were not read."""
    part = full_size(next(f for f in FAMILIES if f.name == name))
    targets = load_config(Path("configs", f"{config}.yaml")).lora.targets
    ends = tuple(f".{target}" for target in targets)
    adapted = [layer for layer in part.shapes if layer.endswith(ends)]
    assert len(adapted) == num
    assert comfyui(part, keys_of(part)) == set()


# which clients read a LoRA of the others, by which names, was not looked up (above: for ComfyUI)
KNOWN = [family for family in FAMILIES if family.title in RECIPES_OF]


@pytest.mark.parametrize("family", KNOWN, ids=lambda family: family.title)
def test_clients_know_every_layer_of_a_recipe_and_nearly_all_others(family):
    """By their rules (lora_clients.py), on the full-size networks: the recipe's targets, and every
    layer, as extract_lora takes them."""
    part = full_size(family)
    targets = load_config(Path("configs", f"{RECIPES_OF[family.title]}.yaml")).lora.targets
    ends = tuple(f".{target}" for target in targets)
    recipe = subset(part, [x for x in part.shapes if f".{x}".endswith(ends)])
    assert len(recipe.shapes) > 200
    for client in (comfyui, invokeai, stable_diffusion_cpp):
        assert not client(recipe, keys_of(recipe))  # none lost, or a family that it has no LoRA of
    keys = keys_of(part)
    assert comfyui(part, keys) == set()
    last = 37 if family.title == "SD3.5 Large" else 23
    embeddings = {f"{x}_embedding.linear_{n}" for x in ("time", "add") for n in (1, 2)}
    lost = {
        "flux": {"norm_out.linear"},
        "sd35": {"norm_out.linear", f"transformer_blocks.{last}.norm1_context.linear"},
        "sdxl": embeddings,
    }
    assert stable_diffusion_cpp(part, keys) == lost[family.name]
    assert (invokeai(part, keys) is None) == (family.name == "sd35")
    if family.name == "flux":
        assert invokeai(part, keys) == set(part.shapes)  # for the sake of one
        others = subset(part, part.shapes.keys() - {"norm_out.linear"})
        assert invokeai(others, keys_of(others)) == set()


def test_clients_do_not_know_what_was_written_before():
    """diffusers' form of SDXL: the reason for kohya's. The number is what ComfyUI 0.3.64 left out
    of the recipe's 784 layers when it was tried."""
    part = full_size(next(f for f in FAMILIES if f.name == "sdxl"))
    keys = {written_key("unet", None, f"{x}.lora_{f}.weight") for x in part.shapes for f in "AB"}
    lost = comfyui(part, keys)
    assert len(lost) == 560 and all(".to_" in layer for layer in lost)
    assert invokeai(part, keys) == set(part.shapes)


def test_which_form_a_family_is_written_in():
    """SDXL's in kohya's, by its authors' names; others in diffusers', and read by authors' too."""
    written = {}
    for name, layer in (
        ("flux", "single_transformer_blocks.0.proj_mlp"),
        ("sd35_medium", "transformer_blocks.0.attn2.to_q"),
        ("sdxl", "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0"),
    ):
        base = ROOT / "assets" / "tiny" / name / "pipeline"
        family = family_of(base, "base")
        part = adapted(family, base)
        assert layer in part.shapes and (part.kohya is None) == (part.authors is not None)
        written[name] = lora_key(family, base)(f"{layer}.lora_B.weight")
        if part.authors:
            assert f"{layer}.weight" in part.authors()
    assert written == {
        "flux": "transformer.single_transformer_blocks.0.proj_mlp.lora_B.weight",
        "sd35_medium": "transformer.transformer_blocks.0.attn2.to_q.lora_B.weight",
        "sdxl": "lora_unet_input_blocks_3_1_transformer_blocks_0_attn1_to_out_0.lora_up.weight",
    }
