"""Offline, CPU, 8 fake devices, no silent rank promotion: set before anything imports jax."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import children
import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["HF_HUB_OFFLINE"] = "1"
_DEVICES = "--xla_force_host_platform_device_count=8"
_DEVICES += " --xla_cpu_enable_concurrency_optimized_scheduler=false"  # see launch.set_environment
_FLAGS = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES} {children.QUICK_TO_COMPILE}"
os.environ["XLA_FLAGS"] = _FLAGS.strip()
# Compiled programs are kept for the other worker, for subprocesses and for the next run (4x less).
_ROOT = Path(__file__).resolve().parents[1]
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(_ROOT / ".pytest_cache" / "jax")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

_SHARED = _ROOT.parent / "shared"


# Files that take longest come first, or one worker ends with them alone.
_FIRST = (
    "test_processes",
    "test_kills",
    "test_notebook",
    "test_docs",
    "test_plan",
    "test_capability",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Orders files, not the tests within them; leaves the long forms to `make soak`."""
    place = {name: i for i, name in enumerate(_FIRST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(_FIRST)))
    if "TRACE_SOAK" in os.environ:
        return
    for item in items:
        if item.get_closest_marker("soak"):
            item.add_marker(pytest.mark.skip(reason="takes minutes: make soak"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data and models, which lie beside the checkout and are not committed."""
    if not (_SHARED / "data").is_dir() or not (_SHARED / "models").is_dir():
        pytest.skip(f"needs the real data and models in {_SHARED}")
    return _SHARED


TINY_CONFIG = """
from trace_jax import config


def get_config():
    c = config.base_config()
    c.mesh.fsdp_limit = 64
    c.data.source = "synth"
    c.data.max_length = 64
    c.data.row_length = 128
    c.data.pairs = 60
    c.data.validation_prompts = 8
    c.data.test_prompts = 8
    s = c.model.scratch
    s.hidden_size, s.intermediate_size, s.layers, s.heads, s.kv_heads = 32, 64, 1, 2, 1
    s.context = 64
    s.documents = 200
    s.training.total_steps = 20
    s.training.warmup_steps = 2
    s.training.learning_rate = 1e-2
    s.training.examples_per_step = 16
    for t in (c.align, c.train):
        t.total_steps = 4
        t.warmup_steps = 1
        t.examples_per_step = 8
        t.retain_per_step = 8
        t.save_every = 2
    c.correct.tries = 8
    c.correct.max_new_tokens = 16
    c.impact.gold_size = 12
    c.evaluate.samples = 1
    c.evaluate.max_new_tokens = 16
    c.evaluate.batch_rows = 16
    c.mesh.fsdp = 1  # of the 8 devices
    return c
"""


@pytest.fixture(scope="session")
def config(tmp_path_factory) -> Path:
    """A config that goes through every stage in seconds; what it trains writes nonsense."""
    path = tmp_path_factory.mktemp("configs") / "tiny.py"
    path.write_text(TINY_CONFIG)
    return path


@pytest.fixture(scope="session")
def straight(config, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """A finished run of `config`, which no test may change, and its process."""
    path = tmp_path_factory.mktemp("runs") / "straight"
    command = [sys.executable, "-m", "trace_jax.launch", f"--config={config}", f"--workdir={path}"]
    root = Path(__file__).resolve().parents[1]
    return path, subprocess.run(command, cwd=root, capture_output=True, text=True)


@pytest.fixture(scope="session")
def storage():
    """Environment of processes that use the storage server."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    program = shutil.which("gcp-storage-emulator", path=Path(sys.executable).parent)
    if program is None:
        pytest.skip("needs gcp-storage-emulator")
    command = [program, "start", "--host=127.0.0.1", f"--port={port}", "--in-memory"]
    process = subprocess.Popen(
        [*command, "--default-bucket=bucket"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    for _ in range(100):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            break
        time.sleep(0.1)
    where = f"http://127.0.0.1:{port}"
    yield {
        "STORAGE_EMULATOR_HOST": where,  # gcsfs
        "TENSORSTORE_GCS_HTTP_URL": where,  # Orbax's arrays
        "GCE_METADATA_HOST": "127.0.0.1:1",
        "NO_GCE_CHECK": "true",
    }
    process.kill()
    process.wait()


@pytest.fixture
def machine(storage, monkeypatch, tmp_path):
    """name -> this process is on a machine of that name: one with its own local copies."""
    for key, value in storage.items():
        monkeypatch.setenv(key, value)

    def on(name: str) -> None:
        monkeypatch.setenv("TRACE_JAX_CACHE", str(tmp_path / name))

    on("one")
    return on


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("needs Chromium")
    with sync_api.sync_playwright() as driver:
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        found = driver.chromium.launch(executable_path=path, args=options)
        yield found
        found.close()


@pytest.fixture
def small_disk(tmp_path):
    """size in KiB -> a folder on a file system of that size, unmounted in the end."""
    mounted = []

    def make(size: int) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        options = ["-t", "tmpfs", "-o", f"size={size}k", "tmpfs"]
        done = subprocess.run(["mount", *options, folder], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"needs the right to mount: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", "-l", folder], check=True)
