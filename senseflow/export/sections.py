"""The sections of a model card that say how a student is sampled, was trained and may be used."""

import math
from pathlib import Path

from senseflow.config.config import Config
from senseflow.core.levels import one_shift
from senseflow.export.source import Source
from senseflow.export.usage import arguments, call_of
from senseflow.teachers.terms import Terms

SD35_SHIFT = 3.0  # that ComfyUI gives every SD3


def table(rows: dict[str, str]) -> str:
    """Two columns of Markdown."""
    lines = [f"| {key} | {value} |" for key, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def sampling(source: Source) -> str:
    """Steps, noise levels, guidance, size, and the settings of the stock scheduler."""
    card, stock, levels = source.card, source.stock, source.family.levels
    rows = {
        "steps": str(len(card.anchors)),
        levels.name: ", ".join(f"{a:.4g}" for a in card.anchors),
        "guidance": _guidance(source),
        "trained at": f"{card.width} x {card.height} pixels (width x height)",
        "sampler": "x0: every step predicts the clean image and adds fresh noise for the next",
        "scheduler": f"`{stock.scheduler}`, {_code(stock.changes)}",
        "the call": _code(call_of(source)),
    }
    if card.max_sequence_length is not None:
        rows["T5 tokens"] = f"{card.max_sequence_length}, in training and sampling"
    return f"## Sampling\n\n{table(rows)}\n\n{_other_steps(source)}"


def _code(values: dict[str, object]) -> str:
    return ", ".join(f"`{arguments({k: v})}`" for k, v in values.items() if v is not None)


def _guidance(source: Source) -> str:
    if source.guidance is not None:
        return f"{source.guidance:g}, fed to the network's guidance embedding"
    if source.family.name == "flux":
        return "none: the network has no guidance embedding, so `guidance_scale` changes nothing"
    off = source.stock.guidance
    return f"none: `guidance_scale={off:g}` leaves out the unconditional half"


def _other_steps(source: Source) -> str:
    """What happens to those who ask for other noise levels."""
    stock, num = source.stock, len(source.card.anchors)
    if "num_inference_steps" not in stock.levels:
        name = next(iter(stock.levels))
        return f"Without `{name}=` the pipeline samples at levels the student has not seen."
    if stock.changes.get("shift_terminal") is not None:
        return (
            f"The scheduler's shift and last sigma are set for {num} steps: "
            f"`num_inference_steps={num}` alone gives the trained sigmas, and `sigmas=` would be "
            "shifted and stretched again."
        )
    if num == 1:
        return ""
    return f"Numbers of steps that divide {num} sample at some of the trained levels."


def comfyui(source: Source, form: str, name: str) -> str:
    """Loader, sampler and the node for the shift."""
    num = len(source.card.anchors)
    return (
        f"## ComfyUI\n\n{_loader(source, form, name)} KSampler: steps {num}, CFG 1, sampler `lcm`, "
        f"scheduler `simple`, denoise 1. {_shift_node(source)}"
    )


def _loader(source: Source, form: str, name: str) -> str:
    teacher = "text encoders and VAE are the teacher's."
    if form == "comfyui":
        place = f"`{name}.safetensors` goes to `ComfyUI/models/diffusion_models`"
        return f"{place}; the node Load Diffusion Model reads it; {teacher}"
    if source.is_lora and form != "pipeline":
        return (
            "`pytorch_lora_weights.safetensors` goes to `ComfyUI/models/loras`; the node "
            "LoraLoaderModelOnly puts it on the teacher."
        )
    return f"Its loader reads one file: export with `--form comfyui`; {teacher}"


def _shift_node(source: Source) -> str:
    anchors = source.card.anchors
    if source.family.name == "sdxl":
        if "timesteps" in source.stock.levels:
            return _by_hand([f"{t:g}" for t in anchors], "timesteps")
        return "That samples at the trained timesteps; no other node is needed."
    shift = one_shift(anchors)
    if shift is None:
        return _by_hand([f"{sigma:.4g}" for sigma in anchors], "sigmas")
    if source.family.name == "sd35":
        if math.isclose(shift, SD35_SHIFT, abs_tol=1e-3):
            return "ComfyUI's own shift for SD3.5, 3, is the trained one: no other node is needed."
        return f"Between loader and sampler the node ModelSamplingSD3 with shift {shift:.4g}."
    mu = f"{math.log(shift):.4g}"
    node = (
        f"the node ModelSamplingFlux with max_shift and base_shift both {mu} (the shift e^{mu} = "
        f"{shift:.4g} at every size)"
    )
    if source.guidance is not None:
        return f"The node FluxGuidance with {source.guidance:g}, and {node}."
    return (
        "A FLUX without guidance embedding is taken for Schnell, whose shift is 1: between loader "
        f"and sampler put {node}, or ModelSamplingAuraFlow with shift {shift:.4g}. Not "
        "ModelSamplingSD3: it feeds the network 1000 sigma in place of sigma."
    )


def _by_hand(levels: list[str], name: str) -> str:
    return (
        f"No scheduler of ComfyUI gives the trained {name}, {', '.join(levels)}: hand them to a "
        "custom sampler."
    )


def training(source: Source) -> str:
    """The recipe and what was switched on."""
    if source.config is None:
        said = f"The run's config.yaml was not at hand; iteration {source.card.iteration}."
        return f"## Training\n\n{said}"
    return f"## Training\n\n{table(_training_rows(source.config, source.card.iteration))}"


def _training_rows(config: Config, iteration: int) -> dict[str, str]:
    train, optimizer = config.train, config.optimizer
    height, width = train.resolution
    return {
        "recipe": f"`{config.recipe}` of SenseFlow",
        "iterations": f"{iteration} of {train.iter_num}; the student moves once in "
        f"{config.fake_score.ttur} (TTUR)",
        "batch": f"{train.batch_size}, over all GPUs",
        "size": f"{width} x {height} pixels (width x height)",
        "data": f"`{Path(config.paths.dataset).name}`",
        "trained": _trained(config),
        "learning rates": f"student {optimizer.lr:g}, fake score {optimizer.fake_score_lr:g}, "
        f"discriminator {optimizer.discriminator_lr:g} (AdamW)",
        **_loss_rows(config),
        "backward simulation": f"in {100 * config.backward_simulation.probability:g} % of "
        "iterations",
        "EMA": _or_off(config.ema.decay, "decay {:g}"),
        "precision": f"{config.precision.compute}, learning weights {config.precision.masters}",
        "seed": str(train.seed),
    }


def _trained(config: Config) -> str:
    if config.lora.rank is None:
        return "all weights"
    return f"LoRA of rank {config.lora.rank} ({config.lora.train})"


def _loss_rows(config: Config) -> dict[str, str]:
    dmd, isg, adversarial = config.dmd, config.isg, config.adversarial
    return {
        "distribution matching": _or_off(dmd.weight, "weight {:g}, teacher's guidance ")
        + (_range(dmd.guidance) if dmd.weight else ""),
        "IDA": _or_off(config.ida.lam, "lambda {:g}"),
        "ISG": _or_off(isg.weight, "weight {:g}, teacher's guidance ")
        + (_range(isg.guidance) if isg.weight else ""),
        "adversary": "off"
        if adversarial.in_use == "none"
        else f"{adversarial.in_use}, weight {adversarial.weight:g}",
    }


def _or_off(value: float | None, words: str) -> str:
    return words.format(value) if value else "off"


def _range(pair: tuple[float, float]) -> str:
    low, high = pair
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def responsible_use() -> str:
    """What it must not be used for, and what it cannot do."""
    return """\
## Responsible use

- Pictures it makes are not photographs and prove nothing. Do not use it to deceive, to depict real
  people without their consent, to harass, or to make what the law or the teacher's licence forbids.
  Say that a picture is generated where someone could take it for real.
- It repeats the biases of its teacher, and of the prompts and images it was distilled with: who and
  what it draws when a prompt leaves it open says nothing about the world.
- Distillation costs variety: pictures of one prompt differ less than the teacher's. Text, hands and
  counts fail as with the teacher, or more often.
- It has no safety filter of its own. Put one around it wherever strangers can type prompts."""


def licence(terms: Terms) -> str:
    """Whose terms bind."""
    if terms.license is None:
        return (
            "## Licence\n\nThe teacher's licence was not stated; it binds the student as it binds "
            "the teacher. The code that trained it is under Apache-2.0."
        )
    name, teacher = terms.license_name or terms.license, terms.base_model or "its teacher"
    link = f"[{name}]({terms.license_link})" if terms.license_link else f"`{name}`"
    return (
        f"## Licence\n\nThe student is derived from {teacher} and under its licence, "
        f"{link}: what binds the teacher's users binds this student's, and a copy of it goes with "
        "every copy of these weights. The code that trained it is under Apache-2.0."
    )
