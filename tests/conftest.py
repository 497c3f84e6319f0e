"""What all tests share."""

from pathlib import Path

import pytest
import torch

from flux_pipeline import save_flux_pipeline

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def flux_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved random FluxPipeline (tests/flux_pipeline.py); not to be changed by a test."""
    return save_flux_pipeline(tmp_path_factory.mktemp("flux") / "pipeline")
