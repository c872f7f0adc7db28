"""A process that triages records by Gemini and may be killed: RECORDS STORE OUT TIMEOUT."""

import sys

import gemini_client

from trace_jax import records, sources, triage


def main() -> None:
    """Triages the records of one file into another."""
    path, kept, out, timeout = sys.argv[1:]
    found, _ = sources.read_records(path)
    judge = gemini_client.judge(
        kept, concurrency=64, tries=10, timeout_seconds=float(timeout), outage_seconds=60.0
    )
    triage.run(found, judge, out)
    records.write_json(f"{out}.counts", triage.summary(triage.read(out)).actions)


if __name__ == "__main__":
    main()
