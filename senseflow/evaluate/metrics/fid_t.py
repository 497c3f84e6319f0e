"""FID-T: the Frechet distance to the teacher's images of the same prompts (Heusel et al. 2017)."""

from pathlib import Path

from senseflow.distill.scorers import metric

MODEL = "Inception-v3 (TensorFlow, 2015-12-05), pool features"
INCEPTION = metric.Flag[Path](
    "--inception", "file",
    "weights-inception-2015-12-05-6726825d.pth, or TorchScript inception-2015-12-05.pt",
    required=True,
)  # fmt: skip
RESIZE = metric.Flag[int](
    "--fid_resize", "pixels", "LANCZOS to this before the bicubic to 299; 0: none (512)", 512
)


def prepare(given: metric.Given) -> metric.Prepared:
    """Whole images, resized as DMD2 does."""
    file, side = given[INCEPTION], given[RESIZE] or None

    def open_it(machine: metric.Machine) -> metric.Judge:
        from senseflow.evaluate.metrics.inception import fid_pixels, open_inception

        words = f"{metric.square_in_words(side)}, clean-fid's bicubic to 299"
        features = open_inception(file, machine.device)
        return metric.Judge(words, lambda picture: fid_pixels(picture, side), features)

    return metric.Prepared(MODEL, [file], {"resize": side}, open_it)


SPEC = metric.Spec(
    metric.Column("fid_t", "FID-T", metric.DOWN, 2),
    about="Frechet distance of Inception-v3 pool features (2048), covariance with N - 1, in "
    "float64; the reference is the teacher's images for the same prompts",
    needs="reference",
    prepare=prepare,
    flags=(INCEPTION, RESIZE),
    float32=True,
)
