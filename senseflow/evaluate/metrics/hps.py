"""HPSv2 (Wu et al. 2023): cosine of image and prompt under a ViT-H-14 tuned to preferences."""

from collections.abc import Callable
from pathlib import Path

from senseflow.evaluate.metrics.metric import (
    Column,
    Flag,
    Given,
    Machine,
    Prepared,
    Scorer,
    Spec,
    file_flag,
    name_flag,
)

MODEL = name_flag("--hps_model", "ViT-H-14", "their architecture (ViT-H-14)")
ABOUT = "mean cosine under the fine-tuned ViT-H-14"


def prepare_with(weights_flag: Flag[Path | None]) -> Callable[[Given], Prepared]:
    """HPSv2 with the weights that a flag names: two versions of one network."""

    def prepare(given: Given) -> Prepared:
        from senseflow.evaluate.metrics.open_clips import find_source

        source = find_source(given[MODEL], given.required(weights_flag), False, "--hps")

        def open_it(machine: Machine) -> Scorer:
            from open_clip.transform import PreprocessCfg, image_transform_v2

            from senseflow.evaluate.metrics.open_clips import Clip, in_words

            clip = Clip(source, machine)
            # the whole image, as HPSv2 was trained: the model's own config would crop
            config = PreprocessCfg(size=clip.config.size, resize_mode="longest", fill_color=0)
            transform = image_transform_v2(config, is_train=False)
            return Scorer(in_words(config), transform, clip.cosines)

        return Prepared(source.model, [source.weights], source.settings, open_it)

    return prepare


WEIGHTS_2_1 = file_flag("--hps_v2.1", "HPS_v2.1_compressed.pt")
WEIGHTS_2 = file_flag("--hps_v2", "HPS_v2_compressed.pt")
V2_1 = Spec(
    Column("hps_v2.1", "HPSv2.1"),
    about=ABOUT,
    needs="prompts",
    prepare=prepare_with(WEIGHTS_2_1),
    flags=(WEIGHTS_2_1, MODEL),
    required=(WEIGHTS_2_1,),
    published=Column("hps", "HPSv2 (version not stated)"),
)
V2 = Spec(
    Column("hps_v2", "HPSv2.0"),
    about=ABOUT,
    needs="prompts",
    prepare=prepare_with(WEIGHTS_2),
    flags=(WEIGHTS_2, MODEL),
    required=(WEIGHTS_2,),
)
