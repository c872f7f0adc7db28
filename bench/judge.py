"""What a judge that is asked over the network costs beside the service itself.

python -m bench.judge [--quick] [--data FILE] [--out FILE]

Against the loopback server of tests/gemini_server.py, which answers every call after a fixed
latency: verdicts a second as a share of concurrency / latency, the most that it could give (medians
of runs whose order alternates); calls that repetition saves on real pairs; writes and reads of the
judgement store a second; time and memory of a triage whose verdicts are all in the store, in a
process of its own, and the memory that each more pair takes of it. Needs Linux.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bench import results
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
CONCURRENCIES = 1, 4, 16, 64, 128, 256
PAIRS = 10_000, 200_000  # in the stores


def serve() -> tuple[subprocess.Popen, str]:
    """The server's process and address."""
    command = [sys.executable, SERVER, f"--key={KEY}", f"--latency={LATENCY}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    return process, f"http://127.0.0.1:{int(process.stdout.readline())}"


def throughput(concurrencies: Sequence[int], seconds: float, repeats: int) -> list[dict]:
    """Verdicts a second at each concurrency, every response asked once; runs of some seconds."""
    process, address = serve()
    os.environ |= {"GOOGLE_GEMINI_BASE_URL": address, "GEMINI_API_KEY": KEY}
    speeds: dict[int, list[float]] = {concurrency: [] for concurrency in concurrencies}
    try:
        _judge(1).judge([("warm", "calm up")])  # imports
        for repeat in range(repeats):
            for concurrency in concurrencies[:: -1 if repeat % 2 else 1]:
                n = max(8, round(seconds * concurrency / LATENCY))
                items = [(f"Tell {i}", f"calm kind {concurrency} {repeat} {i}") for i in range(n)]
                start = time.perf_counter()
                verdicts = _judge(concurrency).judge(items)
                speeds[concurrency].append(n / (time.perf_counter() - start))
                assert all(verdict.status == "compliant" for verdict in verdicts)
    finally:
        process.kill()
        process.wait()
    rows = []
    for concurrency, found in speeds.items():
        limit = concurrency / LATENCY
        shares = [speed / limit for speed in found]
        rows.append(
            {
                "what": "throughput",
                "concurrency": concurrency,
                "verdicts_per_second": statistics.median(found),
                "server_limit": limit,
                "shares_of_server_limit": shares,
            }
        )
        print(f"concurrency {concurrency:4}: {statistics.median(found):7.1f} verdicts/s of "
              f"{limit:6.1f} [{min(shares):.0%}, {max(shares):.0%}]")  # fmt: skip
    return rows


def _judge(concurrency: int) -> judges.Judge:
    c = config.base_config()
    c.asking.concurrency = concurrency
    return judges.make("gemini", POLICY, c.judge.to_dict(), asking=c.asking.to_dict())


def saved(path: Path) -> list[dict]:
    """Calls on real pairs against two a pair; nothing where the file is not here."""
    if not path.exists():
        print(f"{path} is not here: no calls_saved_pku")
        return []
    columns = {"chosen": "safer", "rejected": "worse"}
    found = inspection.inspect(sources.Records(path, sources.Reading(columns=columns)), None)
    share = 1 - found.judgements / found.asked
    print(f"{path.name}: {found.judgements} calls of {found.asked}, {share:.1%} saved")
    row = {"what": "repetition", "naive_calls": found.asked, "calls": found.judgements}
    return [row | {"calls_saved": share}]


def stored(folder: Path, pairs: int) -> dict:
    """Fills a store with verdicts on so many pairs, reads them, and triages in another process."""
    path = folder / "store.sqlite"
    kept = store.Store(path)
    verdicts = {clause: records.ClauseVerdict("compliant", 0.9) for clause in POLICY.clauses}
    items = []
    start = time.perf_counter()
    for record in _pairs(pairs):
        for response in (record.chosen, record.rejected):
            kept.add(READER, record.prompt, response, store.Call("ok", 100), verdicts)
            items.append(store.item_hash(record.prompt, response))
    writes = 2 * pairs / (time.perf_counter() - start)
    kept.close()
    kept = store.Store(path)
    start = time.perf_counter()
    found = kept.find(READER, POLICY.clauses, items)
    reads = 2 * pairs / (time.perf_counter() - start)
    assert len(found) == 2 * pairs
    kept.close()
    records.write_jsonl(folder / "records.jsonl", (r.to_json() for r in _pairs(pairs)))
    command = [sys.executable, "-m", "bench.judge", f"--triage={folder}"]
    report = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    size = path.stat().st_size >> 20
    print(
        f"{2 * pairs} stored verdicts: written at {writes:.0f}/s, read at {reads:.0f}/s, triaged "
        f"in {report['seconds']:.1f} s with {report['mebibytes']:.0f} MiB; {size} MiB on disk"
    )
    speeds = {"writes_per_second": writes, "reads_per_second": reads}
    return {"what": "store", "pairs": pairs} | speeds | report


def _pairs(n: int):
    for i in range(n):
        responses = (f"{word} {i} {TEXT}" for word in CLAUSES)
        yield records.PreferenceRecord(f"r{i}", f"Tell {i}", *responses)


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
    print(json.dumps({"seconds": seconds, "mebibytes": results.peak_mebibytes()}))


def headline(rows: Sequence[dict]) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Shares of what the server could give, calls saved, bytes of memory a pair of a triage."""
    shares = {r["concurrency"]: r["shares_of_server_limit"] for r in rows if "concurrency" in r}
    spread = {"share_of_server_limit": shares[64], "share_of_server_limit_256": shares[256]}
    found = {name: statistics.median(of) for name, of in spread.items()}
    for row in rows:
        if row["what"] == "repetition":
            found["calls_saved_pku"] = row["calls_saved"]
    few, many = (row for row in rows if row["what"] == "store")
    more = (many["mebibytes"] - few["mebibytes"]) * 2**20
    found["triage_bytes_per_pair"] = more / (many["pairs"] - few["pairs"])
    found["reads_per_second"] = many["reads_per_second"]
    found["writes_per_second"] = many["writes_per_second"]
    return found, spread


def main(argv: Sequence[str]) -> int:
    """Runs the parts and writes the results."""
    values = results.flags(
        argv, "judge", __doc__, "concurrency 64 and 256, runs of 4 s, stores of 1,000 and 10,000",
        data={"type": Path, "default": Path("../shared/data/pku/pairs.jsonl.gz")},
        triage={"type": Path, "help": argparse.SUPPRESS},
    )  # fmt: skip
    if values.triage is not None:
        run_triage(values.triage)
        return 0
    rows = throughput((64, 256), 4.0, 2) if values.quick else throughput(CONCURRENCIES, 10.0, 3)
    rows += saved(values.data)
    with tempfile.TemporaryDirectory() as folder:
        for n in (1_000, 10_000) if values.quick else PAIRS:
            part = Path(folder) / str(n)
            part.mkdir()
            rows.append(stored(part, n))
    found, spread = headline(rows)
    results.write(values.out, rows=rows, headline=found, spread=spread, latency_seconds=LATENCY)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
