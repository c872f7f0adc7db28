"""What a judge that is asked over the network costs beside the service itself.

python -m bench.judge [--quick] [--data FILE] [--out FILE]

Against the loopback server of tests/gemini_server.py, which answers every call after a fixed
latency: verdicts a second as a share of concurrency / latency, the most that it could give;
calls that repetition saves on real pairs; writes and reads of the judgement store; time and memory
of a triage whose verdicts are all in the store, in a process of its own.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bench import frontier
from trace_jax import config, judges, policy, records, sources, triage
from trace_jax.judges import reading, store
from trace_jax.sources import inspection

ROOT = Path(__file__).resolve().parents[1]
SERVER = ROOT / "tests" / "gemini_server.py"
KEY = "BenchKey"
LATENCY = 0.5  # seconds, as of a real service
CLAUSES = "calm", "kind"
POLICY = policy.parse(
    "name: bench\nclauses:\n"
    + "".join(f"  - {{id: {c}, requirement: The story is {c}.}}\n" for c in CLAUSES)
)


def serve() -> tuple[subprocess.Popen, str]:
    """The server's process and address."""
    command = [sys.executable, SERVER, f"--key={KEY}", f"--latency={LATENCY}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    return process, f"http://127.0.0.1:{int(process.stdout.readline())}"


def throughput(concurrencies: Sequence[int], seconds: float) -> list[dict]:
    """Verdicts a second at each concurrency, every response asked once."""
    process, address = serve()
    os.environ |= {"GOOGLE_GEMINI_BASE_URL": address, "GEMINI_API_KEY": KEY}
    rows = []
    try:
        _judge(1).judge([("warm", "calm up")])  # imports
        for concurrency in concurrencies:
            n = max(8, round(seconds * concurrency / LATENCY))
            items = [(f"Tell {i}", f"calm kind {concurrency} {i}") for i in range(n)]
            start = time.perf_counter()
            verdicts = _judge(concurrency).judge(items)
            took = time.perf_counter() - start
            assert all(verdict.status == "compliant" for verdict in verdicts)
            limit = concurrency / LATENCY
            rows.append(
                {
                    "concurrency": concurrency,
                    "verdicts": n,
                    "seconds": took,
                    "verdicts_per_second": n / took,
                    "server_limit": limit,
                    "share_of_server_limit": n / took / limit,
                }
            )
            print(f"concurrency {concurrency:4}: {n / took:7.1f} verdicts/s of {limit:7.1f}")
    finally:
        process.kill()
        process.wait()
    return rows


def _judge(concurrency: int) -> judges.Judge:
    c = config.base_config()
    c.asking.concurrency = concurrency
    return judges.make("gemini", POLICY, c.judge.to_dict(), asking=c.asking.to_dict())


def saved(path: Path) -> dict | None:
    """Calls on real pairs against two a pair."""
    if not path.exists():
        print(f"{path} is not here: no calls_saved_pku")
        return None
    columns = {"chosen": "safer", "rejected": "worse"}
    found = inspection.inspect(sources.Records(path, sources.Reading(columns=columns)), None)
    share = 1 - found.judgements / found.asked
    print(f"{path.name}: {found.judgements} calls of {found.asked}, {share:.1%} saved")
    return {"naive_calls": found.asked, "calls": found.judgements, "calls_saved": share}


def stored(folder: Path, pairs: int) -> dict:
    """Fills a store with verdicts on so many pairs, and triages them in another process."""
    found = [
        records.PreferenceRecord(f"r{i}", f"Tell {i}", f"calm {i} {TEXT}", f"kind {i} {TEXT}")
        for i in range(pairs)
    ]
    records.write_jsonl(folder / "records.jsonl", [r.to_json() for r in found])
    path = folder / "store.sqlite"
    kept = store.Store(path)
    verdicts = {clause: records.ClauseVerdict("compliant", 0.9) for clause in POLICY.clauses}
    start = time.perf_counter()
    for record in found:
        for response in (record.chosen, record.rejected):
            kept.add(READER, record.prompt, response, store.Call("ok", 100), verdicts)
    writes = 2 * pairs / (time.perf_counter() - start)
    kept.close()
    command = [sys.executable, "-m", "bench.judge", f"--triage={folder}"]
    report = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    size = path.stat().st_size >> 20
    print(
        f"{2 * pairs} stored verdicts: written at {writes:.0f}/s, triaged in "
        f"{report['seconds']:.1f} s with {report['mebibytes']:.0f} MiB; {size} MiB on disk"
    )
    return {"verdicts": 2 * pairs, "writes_per_second": writes} | report


TEXT = "a response of usual length. " * 12
READER = store.Reader("gemini", "stored", "{}", "t")


class _Silent:
    """A reader that must not be asked."""

    identity, clauses_per_call, collective = READER, 0, False

    def ask(self, questions, answered) -> None:
        raise AssertionError(f"{len(questions)} questions are not in the store")


def run_triage(folder: Path) -> None:
    """Triages `records.jsonl` of a folder from its store, and prints what it took as JSON."""
    start = time.perf_counter()
    found, _ = sources.read_records(folder / "records.jsonl")
    judge = reading.ReadingJudge(POLICY, _Silent(), store.Store(folder / "store.sqlite"))
    triage.run(found, judge, folder / "triage.jsonl")
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "mebibytes": peak}))


def main(argv: Sequence[str]) -> int:
    """Runs the parts and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the headline alone")
    parser.add_argument("--data", type=Path, default=Path("../shared/data/pku/pairs.jsonl.gz"))
    parser.add_argument("--out", type=Path, default=Path("bench/results/judge.json"))
    parser.add_argument("--triage", type=Path, help=argparse.SUPPRESS)
    values = parser.parse_args(argv)
    if values.triage is not None:
        run_triage(values.triage)
        return 0
    rows = throughput((64,) if values.quick else (1, 4, 16, 64, 128, 256), 10.0)
    at_64 = next(row for row in rows if row["concurrency"] == 64)
    headline = {"share_of_server_limit": at_64["share_of_server_limit"]}
    repetition = saved(values.data)
    if repetition is not None:
        headline["calls_saved_pku"] = repetition["calls_saved"]
    sizes = (10_000,) if values.quick else (10_000, 200_000)
    with tempfile.TemporaryDirectory() as folder:
        kept = []
        for n in sizes:
            part = Path(folder) / str(n)
            part.mkdir()
            kept.append(stored(part, n))
    result = frontier.machine() | {
        "latency_seconds": LATENCY,
        "throughput": rows,
        "repetition": repetition,
        "store": kept,
        "headline": headline,
    }
    records.write_json(values.out, result)
    print(f"{values.out}: {headline}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
