"""The GPUs of this machine as they were before the tests hid them (conftest.py)."""

import os

import torch

VISIBLE = os.environ.get("CUDA_VISIBLE_DEVICES")
NUM_GPUS = torch.cuda.device_count()  # asks the driver; CUDA itself is not started
