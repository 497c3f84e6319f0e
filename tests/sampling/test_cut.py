"""What an image does not depend on is not said of it: the end of a prompt, a guidance."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from command_line import call, error_of, pictures, sidecars
from flux_pipeline import transformer
from small import BASES
from transformers import AutoTokenizer

from senseflow.common.fields import FieldError
from senseflow.config.families import family_of
from senseflow.sampling.drawing import Drawing, Paths
from senseflow.sampling.model import Model
from senseflow.teachers.flux.family import FLUX

LONG = "a red seven left of a blue two on white and a green five right of a black nine on yellow"
SMALL = ["--teacher", "--steps", 1, "--height", 32, "--width", 32]


def test_an_end_that_no_encoder_reads_is_said_and_changes_nothing(tmp_path, capsys):
    """SDXL's two encoders read 12 tokens of the embedded teacher's."""
    base = BASES["sdxl"]
    family = family_of(base, "base")
    prompts = ["--prompt", LONG, "--prompt", f"{LONG} and a dog", "--prompt", "a red seven"]
    assert call(family, base, *SMALL, *prompts, "--seed", 3, "--output_dir", tmp_path / "a") == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "longer" in line]
    assert len(lines) == 1 and lines[0].startswith("warning: 2 of 3 prompts are longer than")
    expected = {}
    for name in ("", "_2"):
        tokenizer = AutoTokenizer.from_pretrained(base / f"tokenizer{name}")
        expected[f"text_encoder{name}"] = {"read": 12, "of": len(tokenizer(LONG)["input_ids"])}
    first, second, third = sidecars(tmp_path / "a")
    assert first["cut"] == expected and "cut" not in third
    assert second["cut"]["text_encoder"]["of"] > expected["text_encoder"]["of"]
    # the second prompt alone, with the first one's seed
    flags = ["--prompt", f"{LONG} and a dog", "--seed", 3, "--output_dir", tmp_path / "b"]
    assert call(family, base, *SMALL, *flags) == 0
    assert np.array_equal(
        next(iter(pictures(tmp_path / "a").values())), next(iter(pictures(tmp_path / "b").values()))
    )


def test_the_length_of_t5_is_the_one_that_was_drawn_with(tmp_path):
    base = BASES["flux"]
    family = family_of(base, "base")
    tokenizer = AutoTokenizer.from_pretrained(base / "tokenizer_2")
    num = len(tokenizer(LONG)["input_ids"])
    for length in (num - 1, num):
        flags = ["--prompt", LONG, "--max_sequence_length", length]
        assert call(family, base, *SMALL, *flags, "--output_dir", tmp_path / str(length)) == 0
        (sidecar,) = sidecars(tmp_path / str(length))
        cut = sidecar["cut"].get("text_encoder_2")
        assert cut == ({"read": num - 1, "of": num} if length < num else None)


@pytest.fixture(scope="module")
def without_guidance(flux_folder, tmp_path_factory) -> Path:
    """A FLUX teacher whose network has no guidance embedding, as Schnell's and our students'."""
    base = tmp_path_factory.mktemp("flux") / "base"
    shutil.copytree(flux_folder, base)
    shutil.rmtree(base / "transformer")
    transformer(guidance_embeds=False).save_pretrained(base / "transformer")
    return base


def test_a_guidance_that_a_teacher_cannot_take_is_not_recorded(
    flux_folder, without_guidance, tmp_path, capsys
):
    flags = [*SMALL, "--prompt", "x", "--output_dir"]
    for base, guidance in ((flux_folder, 3.5), (without_guidance, None)):
        assert call(FLUX, base, *flags, tmp_path / base.name) == 0
        assert sidecars(tmp_path / base.name)[0]["guidance"] == guidance
    said = error_of(capsys, FLUX, without_guidance, *flags, tmp_path / "no", "--guidance", 3.5)
    assert "--guidance 3.5: " in said and "takes no guidance" in said
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("name", "taken", "refused"),
    [("sd35_medium", [1, 4.5], [0, 0.5, -1]), ("sdxl", [0, 1, 7], [0.5, -1]), ("flux", [0, 9], [])],
)
def test_a_guidance_below_one_that_the_pipeline_would_pass_over_is_refused(name, taken, refused):
    """diffusers' pipelines guide above 1 alone, whatever is below."""
    base = BASES[name]
    model = Model(family_of(base, "base"), Paths(base), None)
    for guidance in taken:
        assert model.plan(Drawing(guidance=guidance)).guidance == guidance
    for guidance in refused:
        with pytest.raises(FieldError, match=f"guidance {guidance}: the pipeline guides above 1"):
            model.plan(Drawing(guidance=guidance))
