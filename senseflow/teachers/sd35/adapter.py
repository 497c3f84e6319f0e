"""Stable Diffusion 3.5: the adapter and the networks of a StableDiffusion3Pipeline folder.

SD3.5 is a flow teacher with classifier-free guidance; no prompt is the encoding of "". Its clock is
the index before the scheduler's shift (3): laws of t and ISG's mid-points are drawn there, and the
network is told 1000 sigma. Medium and Large are one architecture with other configurations.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor, nn

from senseflow.core.anchors import Anchors, shift_time
from senseflow.core.path import FlowPath
from senseflow.teachers.encoded import Conditioning, KnownPrompts
from senseflow.teachers.pipeline import (
    CfgAdapter,
    PlainNetwork,
    device_of,
    image_patch,
    load_encoders,
    require_pipeline,
    require_plain_student,
    require_resolution,
    require_t5_length,
)
from senseflow.teachers.teacher import TeacherFamily, TeacherSettings, sigmas_of
from senseflow.weights.meta import Build, read_json

NO_PROMPT = ""


@dataclass(frozen=True)
class SD35Adapter(CfgAdapter):
    """An SD3.5 teacher without its transformer."""

    max_sequence_length: int  # T5 tokens
    empty: Conditioning  # the encoding of "", B = 1

    @classmethod
    def load(
        cls,
        settings: TeacherSettings,
        device: torch.device,
        build: Build,
        known: KnownPrompts | None = None,
    ) -> "SD35Adapter":
        """Read encoders and VAE; the empty prompt is encoded, or known."""
        pipeline = load_encoders(
            StableDiffusion3Pipeline, "transformer", settings, device, build, known
        )
        length = settings.max_sequence_length
        assert length, "checked by require"
        if known is None:
            empty = encode(pipeline, [NO_PROMPT], length)
        else:
            empty = known.conditioning(NO_PROMPT).map(lambda tensor: tensor.to(device))
        path, dtype = read_path(settings), settings.compute_dtype
        return cls(pipeline, path, settings.resolution, dtype, length, empty)

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """Both CLIPs and T5, see `encode`."""
        return encode(self.pipeline, prompts, self.max_sequence_length)

    def null(self, cond: Conditioning) -> Conditioning:
        """The encoding of "", as the teacher was trained."""
        return self.empty.expand(len(cond.pooled))

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """v at (x_t, t), float32; the network is told 1000 sigma."""
        dtype = self.compute_dtype
        _, sigma = self.path.alpha_sigma(t)
        output: Tensor = network(
            hidden_states=x_t.to(dtype),
            timestep=1000 * sigma,  # float32, as the scheduler's
            encoder_hidden_states=cond.prompt_embeds.to(dtype),
            pooled_projections=cond.pooled.to(dtype),
            return_dict=False,
        )[0]
        return output.float()


@torch.no_grad()
def encode(
    pipeline: StableDiffusion3Pipeline, prompts: list[str], max_sequence_length: int
) -> Conditioning:
    """Both CLIPs and T5 on the sequence axis, and both projections as pooled."""
    prompt_embeds, _, pooled, _ = pipeline.encode_prompt(
        prompts,
        None,
        None,
        device=device_of(pipeline),
        do_classifier_free_guidance=False,
        max_sequence_length=max_sequence_length,
    )
    return Conditioning(prompt_embeds, pooled)


def read_path(settings: TeacherSettings) -> FlowPath:
    """The flow path with the shift of the folder's scheduler."""
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(
        settings.folder, subfolder="scheduler"
    )
    if scheduler.config.use_dynamic_shifting:
        raise ValueError(f"{settings.folder}: SD3.5's scheduler has one shift, not a dynamic one")
    return FlowPath(shift=scheduler.config.shift)


def read_anchors(settings: TeacherSettings, times: tuple[float, ...]) -> Anchors:
    """The times as they are, for the path shifts them; another shift than its own is put on top
    (shifts multiply)."""
    own = read_path(settings).shift
    shift = (settings.shift or own) / own
    return Anchors(tuple(shift_time(t, shift) for t in times), end=FlowPath.clean)


def require(settings: TeacherSettings) -> None:
    """Raise ValueError unless the settings fit an SD3.5 folder."""
    require_pipeline(settings.folder, StableDiffusion3Pipeline)
    config = read_json(settings.folder / "transformer" / "config.json")
    require_resolution(settings, patch=config["patch_size"])
    require_plain_student(settings)
    require_t5_length(settings, "tokenizer_3")
    largest = config["pos_embed_max_size"] * image_patch(settings, config["patch_size"])
    if max(settings.resolution) > largest:
        raise ValueError(
            f"train.resolution {list(settings.resolution)}: this transformer's table of positions "
            f"ends at {largest} pixels"
        )


def num_dual_attention(folder: Path) -> int:
    """Blocks with dual attention of a pipeline folder: some in Medium, none in Large."""
    config = read_json(folder / "transformer" / "config.json")
    return len(config.get("dual_attention_layers") or ())


def is_medium(folder: Path) -> bool:
    """Whether a folder is there and holds SD3.5 Medium."""
    return (folder / "transformer" / "config.json").is_file() and num_dual_attention(folder) > 0


def require_medium(settings: TeacherSettings) -> None:
    """As `require`; and the folder must not be SD3.5 Large's."""
    require(settings)
    if not num_dual_attention(settings.folder):
        raise ValueError(
            f"{settings.folder} has no dual attention, so it is not SD3.5 Medium: "
            "sh exp_sd35/train_SD35_large_senseflow.sh distils Large"
        )


def require_large(settings: TeacherSettings) -> None:
    """As `require`; and the folder must not be SD3.5 Medium's."""
    require(settings)
    if dual := num_dual_attention(settings.folder):
        raise ValueError(
            f"{settings.folder} holds SD3.5 Medium (dual attention in {dual} blocks), this is the "
            "recipe of Large: sh exp_sd35/train_SD35_senseflow.sh distils Medium"
        )


def blocks_of(network: SD3Transformer2DModel) -> list[nn.Module]:
    """The units of sharding, of activation checkpointing and of compilation."""
    return list(network.transformer_blocks)


NETWORK = PlainNetwork(SD3Transformer2DModel, "transformer", blocks_of, blocks_of)
SD35 = TeacherFamily(
    name="sd35",
    component=NETWORK.component,
    require=require_medium,
    path=read_path,
    anchors=read_anchors,
    sampled_at=sigmas_of,
    load_adapter=SD35Adapter.load,
    teacher=NETWORK.teacher,
    student=NETWORK.student,
    null_prompt=NO_PROMPT,
)
SD35_LARGE = replace(SD35, require=require_large)
