"""Memory that loading a checkpoint takes, in one process and in each of four.

python -m bench.load [--gigabytes 1.0] [--out FILE]

Writes a random sharded bfloat16 checkpoint of a Llama's shape to a temporary folder and loads it in
processes of their own: the peak of their resident memory beyond what the imported libraries and an
empty jax take, against the bytes that they load. Exit 1 where a limit is missed: 1.2 times the
model in one process, 1.2 times its part plus 200 MB in each of four.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import safetensors.numpy

from bench import results
from trace_jax import models, processes, records, sharding
from trace_jax.models import tensor_files

PROCESSES = 4


def write(folder: Path, gigabytes: float) -> int:
    """A checkpoint of about that size in files of a quarter of it; its bytes."""
    width, layers = 1024, max(1, round(gigabytes * 1e9 / (2 * 1024 * 1024 * 12)))
    config = models.ModelConfig(32768, width, 2816, layers, 16, 16, 64, 2048)
    rng, names, total = np.random.default_rng(0), {}, 0
    shapes = {"model.embed_tokens.weight": (32768, width), "lm_head.weight": (32768, width)}
    shapes["model.norm.weight"] = (width,)
    for n in range(layers):
        of_layer = f"model.layers.{n}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{of_layer}{norm}.weight"] = (width,)
        for name in "qkvo":
            shapes[f"{of_layer}self_attn.{name}_proj.weight"] = (width, width)
        for name in ("gate", "up"):
            shapes[f"{of_layer}mlp.{name}_proj.weight"] = (2816, width)
        shapes[f"{of_layer}mlp.down_proj.weight"] = (width, 2816)
    for number in range(1, 5):
        file = f"model-{number:05d}-of-00004.safetensors"
        keys = list(shapes)[number - 1 :: 4]
        noise = rng.integers(0, 2**14, 2**22, np.uint16)  # small positive numbers as bfloat16
        tensors = {k: np.resize(noise, shapes[k]).view(ml_dtypes.bfloat16) for k in keys}
        safetensors.numpy.save_file(tensors, folder / file)
        names |= dict.fromkeys(keys, file)
        total += sum(t.nbytes for t in tensors.values())
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    (folder / tensor_files.INDEX).write_text(json.dumps({"weight_map": names}))
    return total


def load(folder: str, coordinator: str, count: int, index: int) -> None:
    """In a process of its own: loads, and prints its peak beyond what it had before."""
    if count > 1:
        processes.start(coordinator, count, index, auto=False)
    mesh = sharding.make_mesh(1, -1, 1, fsdp_limit=64)
    jax.block_until_ready(jax.numpy.zeros(8))
    Path("/proc/self/clear_refs").write_text("5")  # a child begins with its parent's peak
    before = _peak()
    module = models.load(folder, mesh=mesh)
    jax.block_until_ready(jax.tree.leaves(module))
    own = sum(shard.data.nbytes for x in jax.tree.leaves(module) for shard in x.addressable_shards)
    print(json.dumps({"peak_bytes": _peak() - before, "own_bytes": own, "before_bytes": before}))
    processes.wait("loaded")


def _peak() -> int:
    """Peak of resident memory since the last `clear_refs`, in bytes (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def measure(folder: Path, count: int) -> list[dict]:
    """What each of `count` processes printed."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        where = f"localhost:{found.getsockname()[1]}"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
    }  # fmt: skip
    commands = [
        [sys.executable, "-m", "bench.load", "--of", str(folder), where, str(count), str(index)]
        for index in range(count)
    ]
    started = [
        subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
        for c in commands
    ]
    outputs = [process.communicate() for process in started]
    failed = [err.decode() for p, (_, err) in zip(started, outputs, strict=True) if p.returncode]
    if failed:
        raise SystemExit(failed[0])
    lines = [line for out, _ in outputs for line in out.decode().splitlines()]
    return [json.loads(line) for line in lines if line.startswith("{")]  # the rest is Gloo's


def main(argv: list[str]) -> int:
    """Prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--out", default="docs/results/load.json")
    parser.add_argument("--of", nargs=4, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args(argv[1:])
    if args.of:
        folder, where, count, index = args.of
        load(folder, where, int(count), int(index))
        return 0
    with tempfile.TemporaryDirectory() as name:
        total = write(Path(name), args.gigabytes)
        one, four = measure(Path(name), 1), measure(Path(name), PROCESSES)
    limit_one = 1.2 * total
    ok = one[0]["peak_bytes"] < limit_one
    for found in four:
        ok &= found["peak_bytes"] < 1.2 * found["own_bytes"] + 200e6
    result = {"model_bytes": total, "one": one, "four": four, "within": ok, **results.machine()}
    records.write_json(args.out, result)
    print(f"model {total / 1e6:.0f} MB; one process {one[0]['peak_bytes'] / total:.2f} times that")
    for found in four:
        print(
            f"of four: part {found['own_bytes'] / 1e6:.0f} MB, peak {found['peak_bytes'] / 1e6:.0f}"
        )
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv))
