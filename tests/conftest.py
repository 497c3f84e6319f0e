"""What all tests share: saved random pipelines, not to be changed by a test; the CPU; and a Python
that starts in a moment.

GPUs are hidden from all tests but those of test_gpu.py, which give them to processes of their own.
The libraries are imported by fixtures: the process that hands tests to those of `pytest -n` needs
none, and those are forks of the Python that has them loaded.
"""

import gc
import multiprocessing
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from quick_python import SELDOM, VARIABLE, kept_server

SERVER = pytest.StashKey[object]()


def pytest_configure(config: pytest.Config) -> None:
    """Processes of `pytest -n` use the server of the one that started them, and are of it."""
    if hasattr(config, "workerinput"):
        sys.executable = config.workerinput["executable"]  # Python itself, as without -n
        return
    server = config.stash[SERVER] = kept_server()
    server.__enter__()
    tx = getattr(config.option, "tx", [])
    config.option.tx = [
        f"{spec}//python={os.environ[VARIABLE]}" if spec == "popen" else spec for spec in tx
    ]


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """What a process of `pytest -n` is told."""
    node.workerinput["executable"] = sys.executable


def pytest_collection_finish() -> None:
    """What was imported stays: the collector need not look at it, nor so often at the rest."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*SELDOM)


def pytest_unconfigure(config: pytest.Config) -> None:
    """End the server, and say what all processes took together, those of `pytest -n` too."""
    gc.unfreeze()  # or triton, which bitsandbytes imports, lists all of it at the end as leaks
    if SERVER in config.stash:
        config.stash[SERVER].__exit__(None, None, None)
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        print(f"{sum(u.ru_utime + u.ru_stime for u in used):.0f} CPU seconds")


@pytest.fixture(scope="session", autouse=True)
def one_thread_and_no_gpu() -> None:
    """In a fixture: the processes of `pytest -n` are started before and must count the GPUs."""
    import torch
    from python import PYTHON

    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)
    multiprocessing.set_executable(PYTHON)


@pytest.fixture(scope="session", autouse=True)
def at_first() -> dict[signal.Signals, Any]:
    """What this process does with the stop signals before any test."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    return {number: signal.getsignal(number) for number in numbers}


@pytest.fixture(autouse=True)
def signals_as_at_first(at_first: dict[signal.Signals, Any]) -> None:
    """A run takes up the stop signals for good, also one that a module's fixture made before its
    first test; forks, such as a pool's, are to end by them."""
    for number, handler in at_first.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def flux_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FluxPipeline (tests/parts/flux_pipeline.py)."""
    from flux_pipeline import save_flux_pipeline

    return save_flux_pipeline(tmp_path_factory.mktemp("flux") / "pipeline")


@pytest.fixture(scope="session")
def sd35_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A StableDiffusion3Pipeline with dual attention, as SD3.5 Medium (sd35_pipeline.py)."""
    from sd35_pipeline import save_sd35_pipeline

    return save_sd35_pipeline(tmp_path_factory.mktemp("sd35") / "pipeline")


@pytest.fixture(scope="session")
def sd35_large_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A StableDiffusion3Pipeline without dual attention, as SD3.5 Large."""
    from sd35_pipeline import save_sd35_pipeline

    return save_sd35_pipeline(tmp_path_factory.mktemp("sd35_large") / "pipeline", large=True)


@pytest.fixture(scope="session")
def sdxl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A StableDiffusionXLPipeline (tests/parts/sdxl_pipeline.py)."""
    from sdxl_pipeline import save_sdxl_pipeline

    return save_sdxl_pipeline(tmp_path_factory.mktemp("sdxl") / "pipeline")


@pytest.fixture(scope="session")
def z_image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ZImagePipeline (tests/parts/z_image_pipeline.py)."""
    from z_image_pipeline import save_z_image_pipeline

    return save_z_image_pipeline(tmp_path_factory.mktemp("z_image") / "pipeline")


@pytest.fixture(scope="session")
def flux2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Flux2KleinPipeline (tests/parts/flux2_pipeline.py)."""
    from flux2_pipeline import save_flux2_pipeline

    return save_flux2_pipeline(tmp_path_factory.mktemp("flux2") / "pipeline")


@pytest.fixture(scope="session")
def qwen_image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A QwenImagePipeline (tests/parts/qwen_image_pipeline.py)."""
    from qwen_image_pipeline import save_qwen_image_pipeline

    return save_qwen_image_pipeline(tmp_path_factory.mktemp("qwen_image") / "pipeline")
