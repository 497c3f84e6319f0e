"""Which device a command runs on."""

import pytest
import torch

from senseflow.common.devices import find_device, set_matmul
from senseflow.common.fields import FieldError


@pytest.mark.parametrize("name", ["tpu9", "meta", "mps", "xpu", "cuda", "cuda:7", ""])
def test_a_device_that_is_not_there_is_one_line(name):
    with pytest.raises(ValueError, match=r"^device") as error:
        find_device(name)
    assert "\n" not in str(error.value)


def test_float16_is_refused_where_it_takes_minutes():
    with pytest.raises(FieldError, match="dtype float16 is for GPUs: on a CPU say float32"):
        find_device("cpu", "float16")
    assert find_device("cpu", "bfloat16") == find_device("cpu", None) == torch.device("cpu")


def test_without_a_gpu_it_is_the_cpu():
    assert find_device(None) == find_device("cpu") == torch.device("cpu")


def test_every_rank_has_its_own_gpu(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch, "empty", lambda *shape, device: None)
    for name in (None, "cuda"):
        assert find_device(name) == torch.device("cuda:3")
    assert find_device("cuda:1") == torch.device("cuda:1")


@pytest.mark.parametrize(("precision", "is_tf32"), [("high", True), ("highest", False)])
def test_a_gpu_multiplies_float32_as_it_is_told(precision, is_tf32):
    """Products and convolutions alike, which torch would treat differently; a CPU is not told."""
    of = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in of]
    try:
        for backend in of:
            backend.allow_tf32 = not is_tf32
        set_matmul(torch.device("cpu"), precision)
        assert [backend.allow_tf32 for backend in of] == [not is_tf32] * 2
        set_matmul(torch.device("cuda:0"), precision)
        assert [backend.allow_tf32 for backend in of] == [is_tf32] * 2
        assert torch.get_float32_matmul_precision() == precision
    finally:
        for backend, allowed in zip(of, before, strict=True):
            backend.allow_tf32 = allowed
