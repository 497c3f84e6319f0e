"""The device a command runs on, and the threads beside it."""

import logging
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from senseflow.common.environment import own_position
from senseflow.common.fields import FieldError

logger = logging.getLogger(__name__)


def find_device(name: str | None, dtype: str | None = None) -> torch.device:
    """The device of `--device`; without one the rank's GPU, or the CPU where there is none.

    dtype: what is to be computed there. Raises FieldError for a device that is not there, and for
    float16 on a CPU.
    """
    own = f"cuda:{own_position().local_rank}"
    if name is None:
        name = own if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(own if name == "cuda" else name)
    except RuntimeError as error:
        raise FieldError("device", f"{name} is not a device: {error}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise FieldError("device", f"{name}: this machine has {torch.cuda.device_count()} GPUs")
    if device.type == "meta":
        raise FieldError("device", "meta holds no numbers")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise FieldError("device", f"{name} cannot be used: {reason}") from error
    if device.type == "cpu" and dtype == "float16":
        # PyTorch's convolutions on a CPU took 85 times as long in it as in float32: no use waiting.
        raise FieldError("dtype", "float16 is for GPUs: on a CPU say float32, or bfloat16")
    return device


def set_matmul(device: torch.device, precision: str) -> None:
    """How a GPU multiplies float32 from here on: "high", by TF32, or "highest", as IEEE has it.

    Left alone, torch has TF32 in convolutions and not in matrix products.
    """
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = precision == "high"
        torch.backends.cudnn.allow_tf32 = precision == "high"
        logger.info("float32 products: %s", "TF32" if precision == "high" else "IEEE")


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on a device, without waiting for it."""
    if device.type == "cuda":
        # A copy from memory that may be paged out makes the host wait for the device.
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def one_thread(name: str, device: torch.device) -> ThreadPoolExecutor:
    """A thread beside the loop's own that works for the same device.

    Which GPU is current is a thread's own: without this a thread would work in, and pin memory in
    the context of, the first one.
    """

    def select() -> None:
        if device.type == "cuda":
            torch.cuda.set_device(device)

    return ThreadPoolExecutor(1, name, select)
