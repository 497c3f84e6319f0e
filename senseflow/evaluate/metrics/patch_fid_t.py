"""Patch FID-T: FID-T of one crop of the full image, which sees what resizing hides."""

from senseflow.evaluate.metrics.fid_t import INCEPTION, MODEL
from senseflow.evaluate.metrics.metric import (
    DOWN,
    Column,
    Extractor,
    Given,
    Machine,
    Prepared,
    Spec,
)


def prepare(given: Given) -> Prepared:
    """The centre crop of the full image."""
    file = given.required(INCEPTION)

    def open_it(machine: Machine) -> Extractor:
        from senseflow.evaluate.metrics.inception import load_inception, patch_pixels

        network = load_inception(file).to(machine.device)
        return Extractor("centre crop of 299x299, no resize", patch_pixels, network)

    return Prepared(MODEL, [file], {}, open_it)


SPEC = Spec(
    Column("patch_fid_t", "Patch FID-T", DOWN, 2),
    about="the distance of `fid_t` between one crop of each image at its full size",
    needs="reference",
    prepare=prepare,
    flags=(INCEPTION,),
    required=(INCEPTION,),
    float32=True,
)
