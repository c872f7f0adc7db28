"""One of several processes that judge and write through Gemini; run by test_judges_processes.py.

python judge_process_worker.py HOST:PORT PROCESSES PROCESS FOLDER
"""

import json
import sys
from pathlib import Path

import gemini_client

from trace_jax import config, processes, respond
from trace_jax.errors import InputError
from trace_jax.judges import gemini_job
from trace_jax.writers import gemini


def main(coordinator: str, count: int, index: int, folder: Path) -> None:
    """Writes what this process was told to verdicts-INDEX.jsonl."""
    processes.start(coordinator, count, index, auto=False)
    items = [("Tell", f"calm {'kind' * (i % 2)} {i}") for i in range(30)]
    judge = gemini_client.judge(folder / f"s-{index}.sqlite", concurrency=8)
    verdicts = [verdict.status for verdict in judge.judge(items)]
    preferred = judge.compare([("Tell", "a", "longer"), ("Tell", "b", "c")])
    asking = gemini_job.Asking.of(config.base_config().asking.to_dict())
    settings = gemini_job.Settings("gemini-2.5-flash", 1.0, 80, 0, 0)
    writer = gemini.GeminiWriter(
        gemini_client.POLICY, settings, asking, judge.store, folder / "proposals.jsonl"
    )
    texts = writer.write(
        [respond.Prompt("p", "Tell 1"), respond.Prompt("q", "Tell 2")], first=0, n=1
    )
    found = {"verdicts": verdicts, "preferred": preferred, "texts": texts}
    found["price"] = processes.from_first(writer.price)
    (folder / f"told-{index}.json").write_text(json.dumps(found))
    processes.wait("end")


if __name__ == "__main__":
    where, count, index, folder = sys.argv[1:]
    try:
        main(where, int(count), int(index), Path(folder))
    except InputError as error:
        print(error, file=sys.stderr)
        processes.leave(2)
