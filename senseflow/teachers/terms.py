"""What the public teachers are called on the Hub, and the licences that bind their students."""

import math
from dataclasses import dataclass
from pathlib import Path

from senseflow.teachers.family import Family
from senseflow.weights.stored import component_weights

HUB = "https://huggingface.co"
BUFFERS = ("pos_embed.pos_embed",)  # among the weights, and not learned


@dataclass(frozen=True)
class Terms:
    """A teacher's name and licence, in the Hub's words; None: not known here, nor said."""

    base_model: str | None
    license: str | None  # an identifier of the Hub, or other
    license_name: str | None = None  # of another
    license_link: str | None = None


@dataclass(frozen=True)
class PublicTeacher:
    """A teacher that anyone can have, and how it is told from networks of the same kind."""

    terms: Terms
    num_parameters: int  # of its denoiser


def _other(model: str, name: str) -> Terms:
    return Terms(model, "other", name, f"{HUB}/{model}/blob/main/LICENSE.md")


FLUX = "black-forest-labs/FLUX.1-dev"
SD35 = "stabilityai/stable-diffusion-3.5"
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
COMMUNITY = "stabilityai-ai-community"
PUBLIC = {  # by the title of a family
    "FLUX.1-dev": PublicTeacher(
        _other(FLUX, "flux-1-dev-non-commercial-license"), num_parameters=11_901_408_320
    ),
    "SD3.5 Medium": PublicTeacher(_other(f"{SD35}-medium", COMMUNITY), 2_243_171_520),
    "SD3.5 Large": PublicTeacher(_other(f"{SD35}-large", COMMUNITY), 8_056_627_520),
    "SDXL": PublicTeacher(
        Terms(SDXL, "openrail++", None, f"{HUB}/{SDXL}/blob/main/LICENSE.md"), 2_567_463_684
    ),
}


def terms_of(
    family: Family,
    base: Path,
    base_model: str | None,
    license: str | None,
    license_name: str | None,
    license_link: str | None,
) -> Terms:
    """What is named here, else what is known of a teacher with the public one's parameters.

    Raises ValueError for another licence without its name, and for a name without one.
    """
    if license is None and (license_name or license_link):
        raise ValueError("--license_name and --license_link are for --license other")
    if license == "other" and not license_name:
        raise ValueError("--license other needs --license_name, and --license_link to its text")
    public = PUBLIC[family.title]
    is_public = num_parameters(base / family.component) == public.num_parameters
    own = public.terms if is_public else Terms(None, None)
    if license is None:
        return Terms(base_model or own.base_model, own.license, own.license_name, own.license_link)
    return Terms(base_model or own.base_model, license, license_name, license_link)


def num_parameters(component: Path) -> int:
    """Of a component folder's weights, by their shapes alone."""
    weights = component_weights(component)
    return sum(math.prod(weights.read(key).shape) for key in weights.keys if key not in BUFFERS)
