"""Several processes share one judge: the first one asks, all are told the same."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import children
import gemini_client
import pytest

WORKER = Path(__file__).with_name("judge_process_worker.py")


def run(count, folder, address, **environment):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{probe.getsockname()[1]}"
    started = [
        subprocess.Popen(
            [sys.executable, WORKER, where, str(count), str(i), folder],
            env=gemini_client.subprocess_environment(address, JAX_PLATFORMS="cpu", **environment),
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]
    told = [err for _, err in children.said_by(started)]
    return [process.returncode for process in started], told


def test_the_first_process_asks_and_all_are_told(tmp_path):
    with gemini_client.running() as address:
        codes, told = run(2, tmp_path, address)
        assert codes == [0, 0], told
        counts = gemini_client.get(address)
    first, second = (json.loads((tmp_path / f"told-{i}.json").read_text()) for i in range(2))
    assert first == second
    assert first["verdicts"] == ["violating", "compliant"] * 15
    assert first["preferred"] == ["b", "tie"]
    assert first["texts"] == [["kind words for Tell 1"], ["kind words for Tell 2"]]
    assert first["price"] > 0
    assert counts["requests"] == 30 + 2 + 2  # responses, comparisons, texts: each asked once


@pytest.mark.fault
def test_what_stops_the_first_process_stops_all(tmp_path):
    with gemini_client.running() as address:
        codes, told = run(2, tmp_path, address, GEMINI_API_KEY="wrong")
    assert 2 in codes and 0 not in codes  # who leaves first may take the other along
    assert any("refuses the key in GEMINI_API_KEY" in text for text in told)
