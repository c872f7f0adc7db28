"""Packaging of trace_jax; the version lives in trace_jax/__init__.py."""

import pathlib
import re

import setuptools

ROOT = pathlib.Path(__file__).parent


def version() -> str:
    """Reads the version without importing the package."""
    text = (ROOT / "trace_jax" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE).group(1)


def long_description() -> str:
    """The README, where the source tree has one."""
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.exists() else ""


setuptools.setup(
    name="trace_jax",
    version=version(),
    description="Re-align a language model when its policy changes",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    # configs/ is installed as trace_jax/configs/, so that --config=configs/NAME.py works anywhere.
    packages=[
        *setuptools.find_packages(include=["trace_jax", "trace_jax.*"]),
        "trace_jax.configs",
    ],
    package_dir={"trace_jax": "trace_jax", "trace_jax.configs": "configs"},
    package_data={"trace_jax": ["policies/*.yaml", "templates/*"]},
    python_requires=">=3.11",
    install_requires=[
        "absl-py>=2.1",
        "datasets>=4.0",
        "etils[epath]>=1.12",
        "flax>=0.12.8",
        "google-genai>=3.0",
        "grain>=0.2.12",
        "jax>=0.10.2",
        "jinja2>=3.1",
        "matplotlib>=3.9",
        "ml_collections>=1.0",
        "numpy>=2.0",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.12.8",
        "pyyaml>=6.0",
        "rich>=13.7",
        "safetensors>=0.6.1",
        "scipy>=1.14",
        "tensorboardX>=2.6.4",
        "transformers>=5.0",
    ],
    extras_require={
        "gcs": ["gcsfs>=2026.1"],
        "tpu": ["jax[tpu]>=0.10.2"],
        "cuda": ["jax[cuda12]>=0.10.2"],
        "eval": ["lm_eval>=0.4.13"],
        "wandb": ["wandb>=0.19"],
        "docs": ["mkdocs-material>=9.6", "mkdocstrings[python]>=1.0"],
        "test": [
            "build>=1.2",
            "gcp-storage-emulator>=2026.7",
            "gcsfs>=2026.1",
            "hypothesis>=6.150",
            "kubeflow-trainer-api>=2.3",
            "packaging>=24.0",
            "pytest>=8.0",
            "pytest-xdist>=3.6",
            "ruff>=0.12",
        ],
    },
)
