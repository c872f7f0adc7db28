"""--distributed: two real processes find each other by the variables of each environment."""

import contextlib
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import children
import pytest
import yaml
from jax._src.clusters import cloud_tpu_cluster, slurm_cluster

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """
import json, os, sys
from trace_jax import processes
if sys.argv[1] != "gpu":  # what jax says to itself where it finds TPU chips
    from jax._src.clusters import cloud_tpu_cluster
    cloud_tpu_cluster.running_in_cloud_tpu_vm = True
    if sys.argv[1] == "tpu-vm":
        del os.environ["TPU_SKIP_MDS_QUERY"]
processes.start(None, None, None, auto=True)
from jax.experimental import multihost_utils
import numpy as np
indices = multihost_utils.process_allgather(np.int32(processes.index()))
print(json.dumps([processes.index(), processes.count(), indices.tolist()]))
"""


def _free_port() -> int:
    """One of those that jax takes under SLURM."""
    for port in range(61440 + os.getpid() % 2048, 65536):
        with socket.socket() as s:
            try:
                s.bind(("localhost", port))
            except OSError:
                continue
            return port
    raise AssertionError("no free port")


def _outcomes(machine: str, environments: list[dict[str, str]]) -> list[list]:
    """What a process for each of `environments` finds: its index, their number, all indices."""
    unset = ("SLURM_", "TPU_", "MEGASCALE_", "JAX_COORDINATOR", "OMPI_", "KUBERNETES_")
    base = {key: value for key, value in os.environ.items() if not key.startswith(unset)}
    base |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, machine],
            cwd=ROOT, env=base | own, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for own in environments
    ]  # fmt: skip
    said = children.said_by(started)
    assert [process.returncode for process in started] == [0, 0], said
    return [json.loads(out.splitlines()[-1]) for out, _ in said]


@contextlib.contextmanager
def _told(**entries: str) -> Iterator[dict[str, str]]:
    """The variable by which a process finds a metadata server with `entries` (_ for - in names)."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.removeprefix("/computeMetadata/v1/instance/attributes/")
            found = entries.get(name.replace("-", "_"))
            self.send_response(404 if found is None else 200)
            self.end_headers()
            self.wfile.write((found or "").encode())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield {"GCE_METADATA_IP": f"127.0.0.1:{server.server_port}"}
        server.shutdown()


def test_under_slurm():
    """The variables that srun sets; jax makes the port of the job's number."""
    job = str(_free_port() - 61440)
    shared = {"SLURM_JOB_ID": job, "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    found = _outcomes(
        "gpu",
        [
            shared | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_STEP_NUM_NODES": "1"}
            for rank in "01"
        ],
    )
    assert found == [[0, 2, [0, 1]], [1, 2, [0, 1]]]


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("node[001-004,7],other", "node001"), ("gpu-a,gpu-b", "gpu-a"), ("gpu[7,9]", "gpu7")],
)
def test_the_first_of_slurms_nodes_is_where_all_meet(monkeypatch, nodes, first):
    monkeypatch.setenv("SLURM_STEP_NODELIST", nodes)
    monkeypatch.setenv("SLURM_JOB_ID", "4097")
    address = slurm_cluster.SlurmCluster.get_coordinator_address(None, None)
    assert address == f"{first}:61441"


def test_in_pods_of_gke():
    """The variables that GKE gives to a pod with google.com/tpu."""
    shared = {
        "TPU_WORKER_HOSTNAMES": "localhost,localhost", "TPU_SKIP_MDS_QUERY": "true",
        "JAX_COORDINATOR_PORT": str(_free_port()),
    }  # fmt: skip
    with _told(tpu_env="ZONE: 'here'\n") as where:
        found = _outcomes("gke", [shared | where | {"TPU_WORKER_ID": rank} for rank in "01"])
    assert found == [[0, 2, [0, 1]], [1, 2, [0, 1]]]


def test_on_the_workers_of_a_tpu_slice():
    """What the metadata server says on each TPU VM."""
    port = {"JAX_COORDINATOR_PORT": str(_free_port())}
    shared = {
        "worker_network_endpoints": "a:0:127.0.0.1,b:1:127.0.0.1",
        "tpu_env": "ACCELERATOR_TYPE: 'v5litepod-16'\n",
    }
    with (
        _told(agent_worker_number="0", **shared) as first,
        _told(agent_worker_number="1", **shared) as second,
    ):
        found = _outcomes("tpu-vm", [port | first, port | second])
    assert found == [[0, 2, [0, 1]], [1, 2, [0, 1]]]


def test_the_job_set_opens_the_port_where_processes_meet():
    text = (ROOT / "launch" / "gke_jobset.yaml").read_text()
    (job,) = yaml.safe_load(text.replace("${", "").replace("}", ""))["spec"]["replicatedJobs"]
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    ports = [str(port["containerPort"]) for port in container["ports"]]
    assert cloud_tpu_cluster.coordinator_port in ports
