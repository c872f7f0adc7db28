"""What tests need to meet the loopback server of gemini_server.py: its process, judges, counts."""

import contextlib
import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

from trace_jax import config, judges, policy

KEY = "AIzaTestKeyThatMustAppearNowhere"
SERVER = Path(__file__).with_name("gemini_server.py")
POLICY = policy.parse("""\
name: tales
clauses:
  - {id: calm, requirement: The story is calm.}
  - {id: kind, requirement: The story is kind.}
""")


@contextlib.contextmanager
def running(**options):
    """The address of a fresh server, which takes KEY."""
    flags = [f"--{name}={value}" for name, value in ({"key": KEY} | options).items()]
    process = subprocess.Popen([sys.executable, SERVER, *flags], stdout=subprocess.PIPE, text=True)
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.kill()
        process.wait()


def environment(address, key=KEY):
    """Variables by which google-genai finds the server."""
    return {"GOOGLE_GEMINI_BASE_URL": address, "GEMINI_API_KEY": key}


def reach(address, monkeypatch):
    """Points google-genai of this process to the server."""
    monkeypatch.delenv("GOOGLE_API_KEY", raising=False)
    for name, value in environment(address).items():
        monkeypatch.setenv(name, value)


def get(address, path="/counts", body=None):
    """What the server says of itself, or the option it is told to change."""
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(address + path, data=data) as reply:
        return json.load(reply)


def judge(kept=None, rules=POLICY, gemini=(), **asking):
    """A gemini judge with these settings and ways of asking; retries are quick."""
    c = config.base_config()
    c.judge.gemini.update(dict(gemini))
    c.asking.update({"backoff_seconds": 0.01, "tries": 8} | asking)
    settings, way = c.judge.to_dict(), c.asking.to_dict()
    return judges.make("gemini", rules, settings, asking=way, store=kept)


def subprocess_environment(address, **more):
    """The same for a process of its own."""
    root = str(SERVER.parents[1])
    return os.environ | environment(address) | {"PYTHONPATH": root} | more
