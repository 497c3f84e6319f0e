"""LAION's aesthetic predictor (Schuhmann 2022): a linear head on OpenAI's CLIP ViT-L/14.

It looks at the image alone, whatever the prompt.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from senseflow.distill.scorers import metric

if TYPE_CHECKING:
    from torch import Tensor

HEAD = metric.Flag[Path]("--aesthetic", "file", "sac+logos+ava1-l14-linearMSE.pth", required=True)
CLIP = metric.Flag[Path](
    "--aesthetic_clip", "file", "OpenAI's CLIP ViT-L/14, in open_clip's keys", required=True
)
MODEL = metric.Flag[str](
    "--aesthetic_model", "text", "its architecture, or local-dir:FOLDER (ViT-L-14)", "ViT-L-14"
)


def prepare(given: metric.Given) -> metric.Prepared:
    """Raises ValueError for an architecture that open_clip does not know."""
    from senseflow.distill.scorers.open_clips import find_source

    head, model = given[HEAD], given[MODEL]
    quick_gelu = not model.startswith(metric.LOCAL)  # OpenAI's; a folder says its own
    source = find_source(model, given[CLIP], quick_gelu, "--aesthetic")

    def open_it(machine: metric.Machine) -> metric.Judge:
        from torch import nn

        from senseflow.distill.scorers.linear_head import linear_head
        from senseflow.distill.scorers.open_clips import Clip
        from senseflow.distill.scorers.pixels import on_tensors

        clip, state = Clip(source, machine), metric.read_tensors(head)
        layers = linear_head(clip.model.visual.output_dim)
        network = nn.ModuleDict({"layers": layers})
        metric.fill(
            lambda: network.load_state_dict(state, strict=False),
            network, head, "LAION's aesthetic predictor",
        )  # fmt: skip
        layers.to(machine.device).eval().requires_grad_(False)

        def score(pixels: "Tensor", prompts: list[str]) -> "Tensor":
            found: Tensor = layers(clip.images(pixels))[:, 0]
            return found

        return metric.Judge(
            *clip.on_squares(None),
            score,
            tensors=on_tensors(clip.config),
            network=nn.ModuleDict({"clip": clip.model, "head": layers}),
        )

    return metric.Prepared(
        f"a linear head on {source.model}", [head, source.weights], source.settings, open_it
    )


SPEC = metric.Spec(
    metric.Column("aesthetic", "Aesthetic", digits=2),
    about="LAION's aesthetic predictor: a linear head on CLIP ViT-L/14, whatever the prompt",
    needs="prompts",
    prepare=prepare,
    flags=(HEAD, CLIP, MODEL),
)
