"""SenseFlow: distil a large text-to-image teacher into a 4-step student."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="senseflow",
    version="0.1.0",
    description="Distribution matching distillation of SDXL, SD3.5 and FLUX into 4-step students",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["senseflow", "senseflow.*"]),
    package_data={"": ["*.json", "*.css", "*.html", "*.j2"]},
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.8",
        "torchvision>=0.23",
        "diffusers>=0.42",
        "transformers>=5.0",
        "accelerate>=1.10",
        "safetensors>=0.6",
        "huggingface_hub>=1.0",
        "peft>=0.18",
        "timm>=1.0.20",
        "open_clip_torch>=3.0",
        "sentencepiece>=0.2",
        "protobuf>=5",
        "numpy>=2.0",
        "pillow>=11",
        "lmdb>=1.6",
        "PyYAML>=6.0",
        "jinja2>=3.1",
        "psutil>=5.9",
        "tqdm>=4.66",
        "tensorboard>=2.18",
        "matplotlib>=3.9",
    ],
    extras_require={
        "evaluate": ["torch-fidelity>=0.4", "torchmetrics>=1.9"],
        "demo": ["scikit-learn>=1.5"],
        "app": ["gradio>=6.31,<7"],
        "parquet": ["pyarrow>=15"],
        "test": [
            "scikit-learn>=1.5",
            "torch-fidelity>=0.4",
            "torchmetrics>=1.9",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "gradio>=6.31,<7",
            "playwright>=1.50",
            "ruff>=0.9",
            "mypy>=1.14",
            "types-PyYAML",
        ],
    },
)
