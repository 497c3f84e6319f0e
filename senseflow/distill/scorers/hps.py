"""HPSv2 (Wu et al. 2023): cosine of image and prompt under a ViT-H-14 tuned to preferences.

Its two versions are weights of one network.
"""

from functools import partial
from pathlib import Path

from senseflow.distill.scorers import metric

ABOUT = "mean cosine under the fine-tuned ViT-H-14"
MODEL = metric.Flag[str]("--hps_model", "text", "their architecture (ViT-H-14)", "ViT-H-14")
WEIGHTS_2_1 = metric.Flag[Path]("--hps_v2.1", "file", "HPS_v2.1_compressed.pt", required=True)
WEIGHTS_2 = metric.Flag[Path]("--hps_v2", "file", "HPS_v2_compressed.pt", required=True)


def prepare(weights: metric.Flag[Path], given: metric.Given) -> metric.Prepared:
    """With the weights that a flag names, on the whole image padded."""
    from senseflow.distill.scorers.open_clips import find_source

    source = find_source(given[MODEL], given[weights], False, "--hps")

    def open_it(machine: metric.Machine) -> metric.Judge:
        from open_clip.transform import PreprocessCfg, image_transform_v2

        from senseflow.distill.scorers.open_clips import Clip, in_words
        from senseflow.distill.scorers.pixels import on_tensors

        clip = Clip(source, machine)
        # as HPSv2 was trained; the config that comes with the architecture would crop
        config = PreprocessCfg(size=clip.config.size, resize_mode="longest", fill_color=0)
        transform = image_transform_v2(config, is_train=False)
        tensors = on_tensors(config)
        return metric.Judge(
            in_words(config), transform, clip.cosines, clip.reads(), tensors, clip.model
        )

    return metric.Prepared(source.model, [source.weights], source.settings, open_it)


V2_1 = metric.Spec(
    metric.Column("hps_v2.1", "HPSv2.1"),
    about=ABOUT,
    needs="prompts",
    prepare=partial(prepare, WEIGHTS_2_1),
    flags=(WEIGHTS_2_1, MODEL),
    published=metric.Column("hps", "HPSv2 (version not stated)"),
)
V2 = metric.Spec(
    metric.Column("hps_v2", "HPSv2.0"),
    about=ABOUT,
    needs="prompts",
    prepare=partial(prepare, WEIGHTS_2),
    flags=(WEIGHTS_2, MODEL),
)
