"""Offline, CPU, 8 fake devices, no silent rank promotion: set before anything imports jax."""

import os
from pathlib import Path

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["HF_HUB_OFFLINE"] = "1"
_DEVICES = "--xla_force_host_platform_device_count=8"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}".strip()
# Compiled programs are kept for the other worker, for subprocesses and for the next run (4x less).
_ROOT = Path(__file__).resolve().parents[1]
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(_ROOT / ".pytest_cache" / "jax")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

_SHARED = _ROOT.parent / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data and models, which lie beside the checkout and are not committed."""
    if not (_SHARED / "data").is_dir() or not (_SHARED / "models").is_dir():
        pytest.skip(f"needs the real data and models in {_SHARED}")
    return _SHARED
