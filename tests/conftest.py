"""What all tests share: saved random pipelines, not to be changed by a test; and the CPU.

GPUs are hidden from all tests but those of test_gpu.py, which give them to processes of their own.
"""

import os
from pathlib import Path

import gpus  # noqa: F401  counts them before they are hidden
import pytest
import torch
from flux_pipeline import save_flux_pipeline
from sd35_pipeline import save_sd35_pipeline
from sdxl_pipeline import save_sdxl_pipeline

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def hide_gpus() -> None:
    """In a fixture: the processes of `pytest -n` are started before and must count the GPUs."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session")
def flux_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FluxPipeline (tests/parts/flux_pipeline.py)."""
    return save_flux_pipeline(tmp_path_factory.mktemp("flux") / "pipeline")


@pytest.fixture(scope="session")
def sd35_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A StableDiffusion3Pipeline with dual attention, as SD3.5 Medium (sd35_pipeline.py)."""
    return save_sd35_pipeline(tmp_path_factory.mktemp("sd35") / "pipeline")


@pytest.fixture(scope="session")
def sd35_large_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A StableDiffusion3Pipeline without dual attention, as SD3.5 Large."""
    return save_sd35_pipeline(tmp_path_factory.mktemp("sd35_large") / "pipeline", large=True)


@pytest.fixture(scope="session")
def sdxl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A StableDiffusionXLPipeline (tests/parts/sdxl_pipeline.py)."""
    return save_sdxl_pipeline(tmp_path_factory.mktemp("sdxl") / "pipeline")
