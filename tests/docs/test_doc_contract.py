"""The commands that users of the released code know are still taken, word for word."""

import pytest
from doc_programs import Program, check_command, options

COMMANDS = """
sh exp_flux/train_flux_senseflow.sh 1 8 configs/FLUX/flux_senseflow.yaml /path/to/save
sh exp_sdxl/train_sdxl_senseflow.sh 1 8 configs/sdxl/sdxl_senseflow.yaml /path/to/save
sh exp_sdxl/train_sdxl_dmd2.sh 1 8 configs/sdxl/sdxl_dmd2.yaml /path/to/save
sh exp_sd35/train_SD35_senseflow.sh 1 8 configs/SD35/sd35_senseflow.yaml /path/to/save
sh exp_sd35/train_SD35_large_senseflow.sh 1 8 configs/SD35/sd35_senseflow.yaml /path/to/save
python scripts_flux/test_flux_senseflow.py --flux_ckpt /path/to/FLUX.1-dev
python scripts_sdxl/test_sdxl_senseflow.py --sdxl_ckpt /path/to/stable-diffusion-xl-base-1.0
python scripts_sdxl/test_sdxl_dmd2.py --sdxl_ckpt /path/to/stable-diffusion-xl-base-1.0
python scripts_sd35/test_senseflow_sd35.py --sd35_ckpt /path/to/stable-diffusion-3.5-medium
python scripts_sd35/test_senseflow_sd35_large.py --sd35_ckpt /path/to/stable-diffusion-3.5-large
""".strip().splitlines()
REST = " --checkpoint /path/to/senseflow_checkpoint.pth --output_dir ./outputs"
OPTIONAL = {"--prompts_file", "--start_idx", "--num_prompts", "--batch_size", "--output_dir"}
CONFIG_FLAGS = {
    "scripts_flux": "--dit_config", "scripts_sdxl": "--unet_config",
    "scripts_sd35": "--transformer_config",
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_released_code(command):
    is_sampling = command.startswith("python")
    check_command(command + REST * is_sampling)
    if is_sampling:
        script = command.split()[1]
        flags = options(Program("script", script))
        assert OPTIONAL | {CONFIG_FLAGS[script.split("/")[0]]} <= flags
