"""`python -m senseflow.evaluate score`: flags, and checks that need no torch."""

import argparse
import os
from pathlib import Path

from senseflow.common.commands import Parser

METRICS = {  # and the flags they cannot do without; what else they need, their modules say
    "fid_t": ("inception",),
    "patch_fid_t": ("inception",),
    "clip": (),
    "hps_v2": ("hps_v2",),
    "hps_v2.1": ("hps_v2_1",),
    "pick_score": ("pick_score",),
    "image_reward": (),
    "diversity_lpips": ("lpips_weights",),
    "diversity_clip": (),
    "diversity_dinov2": (),
}
AGAINST_REFERENCE = ("fid_t", "patch_fid_t")
FILES = ("inception", "clip_weights", "hps_v2", "hps_v2_1", "lpips_weights", "dinov2_weights",
         "prompts_file", "reference_prompts_file")  # fmt: skip
FOLDERS = ("images", "reference", "pick_score", "pick_processor", "image_reward",
           "image_reward_tokenizer")  # fmt: skip

DESCRIPTION = """\
Measure a folder of images and put the results into a JSON file. Weights are local files: nothing is
downloaded. A metric that the file already has for the same images, weights and settings is not
computed again. Under torchrun each process takes its share of the images.
"""
EPILOG = """example:
  %(prog)s --images runs/student --reference runs/teacher \\
      --name student --output results.json --metrics fid_t patch_fid_t clip \\
      --inception weights-inception-2015-12-05-6726825d.pth \\
      --clip_weights CLIP-ViT-g-14/open_clip_pytorch_model.safetensors
"""


def add_arguments(parser: Parser) -> None:
    """The flags of `score`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    _add_image_flags(parser)
    _add_fid_flags(parser)
    _add_clip_flags(parser)
    _add_preference_flags(parser)
    _add_diversity_flags(parser)
    _add_machine_flags(parser)


def _add_image_flags(parser: Parser) -> None:
    group = parser.add_argument_group("what")
    group.add_argument(
        "--images", type=Path, required=True, metavar="DIR",
        help="images with the sidecars of our sampling, or any (with --prompts_file); several "
        "seeds lie in seed_0/, seed_1/, ...",
    )  # fmt: skip
    group.add_argument(
        "--reference", type=Path, metavar="DIR", help="teacher's or real images, for the two FIDs"
    )
    group.add_argument("--metrics", nargs="+", required=True, choices=METRICS, metavar="METRIC",
                       help=", ".join(METRICS))  # fmt: skip
    group.add_argument("--name", required=True, help="of the row, such as 'FLUX, 4 steps'")
    group.add_argument("--output", type=Path, default=Path("results.json"), metavar="JSON")
    for flag, whose in (
        ("--prompts_file", "--images"),
        ("--reference_prompts_file", "--reference"),
    ):
        group.add_argument(
            flag, type=Path, metavar="FILE",
            help=f"prompts of {whose} in place of sidecars: .txt, a line per image in the order "
            'of their names, or .json: {"file name": "prompt"}',
        )  # fmt: skip
    group.add_argument("--mixed_sizes", action="store_true", help="images may differ in size")
    group.add_argument("--again", action="store_true", help="compute what is there already too")


def _add_fid_flags(parser: Parser) -> None:
    group = parser.add_argument_group("fid_t, patch_fid_t")
    group.add_argument(
        "--inception", type=Path, metavar="FILE",
        help="weights-inception-2015-12-05-6726825d.pth, or TorchScript inception-2015-12-05.pt",
    )  # fmt: skip
    group.add_argument(
        "--fid_resize", type=int, default=512, metavar="PIXELS",
        help="fid_t: LANCZOS to this before the bicubic to 299; 0: none (512)",
    )  # fmt: skip


def _add_clip_flags(parser: Parser) -> None:
    group = parser.add_argument_group("clip, diversity_clip")
    group.add_argument(
        "--clip_model", default="ViT-g-14", metavar="NAME",
        help="open_clip architecture, or local-dir:FOLDER with open_clip_config.json (ViT-g-14)",
    )  # fmt: skip
    group.add_argument("--clip_weights", type=Path, metavar="FILE", help="in open_clip's keys")
    group.add_argument(
        "--clip_quick_gelu", type=_truth, metavar="BOOL", help="true for OpenAI's weights"
    )
    group.add_argument(
        "--clip_prefix", default="A photo depicts ", metavar="TEXT",
        help="before each prompt ('A photo depicts ')",
    )  # fmt: skip
    group.add_argument(
        "--clip_resize", type=int, default=256, metavar="PIXELS",
        help="LANCZOS to this before the model's preprocessing; 0: none (256)",
    )  # fmt: skip


def _add_preference_flags(parser: Parser) -> None:
    group = parser.add_argument_group("hps_v2, hps_v2.1, pick_score, image_reward")
    group.add_argument("--hps_v2", type=Path, metavar="FILE", help="HPS_v2_compressed.pt")
    group.add_argument(
        "--hps_v2.1", dest="hps_v2_1", type=Path, metavar="FILE", help="HPS_v2.1_compressed.pt"
    )
    group.add_argument(
        "--hps_model", default="ViT-H-14", metavar="NAME", help="their architecture (ViT-H-14)"
    )
    group.add_argument("--pick_score", type=Path, metavar="DIR", help="PickScore_v1")
    group.add_argument(
        "--pick_processor", type=Path, metavar="DIR", help="its processor (default: the same)"
    )
    group.add_argument(
        "--image_reward", type=Path, metavar="DIR", help="ImageReward.pt and med_config.json"
    )
    group.add_argument(
        "--image_reward_tokenizer", type=Path, metavar="DIR", help="bert-base-uncased's tokenizer"
    )


def _add_diversity_flags(parser: Parser) -> None:
    group = parser.add_argument_group("diversity_lpips, diversity_dinov2")
    group.add_argument("--lpips_weights", type=Path, metavar="FILE",
                       help="torchvision's alexnet-owt-7be5be79.pth")  # fmt: skip
    group.add_argument("--lpips_net", choices=("alex", "vgg"), default="alex")
    group.add_argument("--lpips_size", type=int, default=512, metavar="PIXELS",
                       help="LANCZOS to this; 0: none (512)")  # fmt: skip
    group.add_argument(
        "--dinov2", default="vit_large_patch14_dinov2.lvd142m", metavar="NAME",
        help="timm name, or local-dir:FOLDER (vit_large_patch14_dinov2.lvd142m)",
    )  # fmt: skip
    group.add_argument("--dinov2_weights", type=Path, metavar="FILE")
    group.add_argument("--dinov2_size", type=int, default=224, metavar="PIXELS", help="(224)")


def _add_machine_flags(parser: Parser) -> None:
    group = parser.add_argument_group("machine")
    group.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    group.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32",
        help="of CLIP-like models; Inception and LPIPS are float32 (float32)",
    )  # fmt: skip
    group.add_argument("--batch_size", type=int, default=32)
    group.add_argument("--threads", type=int, default=4, help="that decode images, per process (4)")


def _truth(text: str) -> bool:
    if text not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text == "true"


def run(args: argparse.Namespace) -> None:
    """Check, measure, write; raises ValueError for what cannot be measured."""
    check(args)
    os.environ["HF_HUB_OFFLINE"] = (
        "1"  # timm, open_clip and transformers would fetch what they lack
    )
    try:
        from senseflow.evaluate.scoring import score  # torch and the models' libraries, seconds
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{error.name} is not installed: pip install -r requirements.txt"
        ) from error
    score(args)


def check(args: argparse.Namespace) -> None:
    """What needs no torch; raises ValueError."""
    if not args.name.strip():
        raise ValueError("--name is empty")
    for name in FILES:
        path = getattr(args, name)
        if path is not None and not path.is_file():
            raise ValueError(f"--{_flag(name)} {path} is not a file")
    for name in FOLDERS:
        path = getattr(args, name)
        if path is not None and not path.is_dir():
            raise ValueError(f"--{_flag(name)} {path} is not a folder")
    for metric in args.metrics:
        for name in METRICS[metric]:
            if getattr(args, name) is None:
                raise ValueError(f"{metric} needs --{_flag(name)} (--help says what it is)")
        if metric in AGAINST_REFERENCE and args.reference is None:
            raise ValueError(f"{metric} needs --reference: the folder of the teacher's images")
    for name in ("batch_size", "threads", "dinov2_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)} must be at least 1")
    for name in ("fid_resize", "clip_resize", "lpips_size"):
        if getattr(args, name) < 0:
            raise ValueError(f"--{name} {getattr(args, name)} must be 0 (none) or a size in pixels")
    if args.output.is_dir():
        raise ValueError(f"--output {args.output} is a folder: name a file")


def _flag(name: str) -> str:
    return "hps_v2.1" if name == "hps_v2_1" else name
