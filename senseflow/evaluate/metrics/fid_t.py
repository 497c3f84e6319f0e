"""FID-T: the Frechet distance to the teacher's images of the same prompts (Heusel et al. 2017)."""

from senseflow.evaluate.metrics.metric import (
    DOWN,
    Column,
    Extractor,
    Given,
    Machine,
    Prepared,
    Spec,
    file_flag,
    resize_flag,
    square_in_words,
)

MODEL = "Inception-v3 (TensorFlow, 2015-12-05), pool features"
INCEPTION = file_flag(
    "--inception",
    "weights-inception-2015-12-05-6726825d.pth, or TorchScript inception-2015-12-05.pt",
)
RESIZE = resize_flag("--fid_resize", 512)  # before the bicubic to 299: DMD2's protocol


def prepare(given: Given) -> Prepared:
    """Whole images, resized as DMD2 does."""
    file, side = given.required(INCEPTION), given[RESIZE] or None

    def open_it(machine: Machine) -> Extractor:
        from senseflow.evaluate.metrics.inception import fid_pixels, load_inception

        return Extractor(
            f"{square_in_words(side)}, clean-fid's bicubic to 299",
            lambda picture: fid_pixels(picture, side),
            load_inception(file).to(machine.device),
        )

    return Prepared(MODEL, [file], {"resize": side}, open_it)


SPEC = Spec(
    Column("fid_t", "FID-T", DOWN, 2),
    about="Frechet distance of Inception-v3 pool features (2048), covariance with N - 1, in "
    "float64; the reference is the teacher's images for the same prompts",
    needs="reference",
    prepare=prepare,
    flags=(INCEPTION, RESIZE),
    required=(INCEPTION,),
    float32=True,
)
