"""Patch FID-T: FID-T of one crop of the full image, which sees what resizing hides."""

from senseflow.distill.scorers import metric
from senseflow.evaluate.metrics.fid_t import INCEPTION, MODEL


def prepare(given: metric.Given) -> metric.Prepared:
    """The centre crop of the full image."""

    def open_it(machine: metric.Machine) -> metric.Judge:
        from senseflow.evaluate.metrics.inception import open_inception, patch_pixels

        features = open_inception(given[INCEPTION], machine.device)
        return metric.Judge("centre crop of 299x299, no resize", patch_pixels, features)

    return metric.Prepared(MODEL, [given[INCEPTION]], {}, open_it)


SPEC = metric.Spec(
    metric.Column("patch_fid_t", "Patch FID-T", metric.DOWN, 2),
    about="the distance of `fid_t` between one crop of each image at its full size",
    needs="reference",
    prepare=prepare,
    flags=(INCEPTION,),
    float32=True,
)
