"""What a run tells its user while it runs: metrics.jsonl, progress on stderr, tables on stdout."""

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from rich import console, text
from rich import progress as rich_progress
from rich import table as rich_table

from trace_jax import errors, heartbeat, processes, records, tracking
from trace_jax.errors import InputError

_PLAIN_INTERVAL_S = 10.0  # between progress lines where there is no terminal
_PLAIN_WIDTH = 200  # columns of a table where there is no terminal


class MetricsWriter:
    """Appends lines {"step": n, "train/loss": ...} to a JSONL file, and tells `tracking`.

    resume_after: the step of the checkpoint that the run resumes from, 0 for a fresh run. Lines of
    later steps are dropped, since they will be written again.

    Attributes:
      skipped: steps that were not finite, of earlier tries too.
    """

    def __init__(self, path: Path, *, resume_after: int):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = read_metrics(self.path) if resume_after and self.path.exists() else []
        kept = [row for row in kept if row["step"] <= resume_after]
        missing = resume_after - len({row["step"] for row in kept})
        if missing:
            say(
                f"  warning: {self.path} lacks {missing} of the {resume_after} steps before this "
                "one; they are not written again, and none of them counts for skip_steps"
            )
        records.write_jsonl(self.path, kept)
        self.skipped = sum(row.get("train/skipped") or 0 for row in kept)
        self._kind = tracking.kind_of(self.path)
        where = self.path if processes.is_first() else Path(os.devnull)
        self._file = where.open("a", encoding="utf-8")

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends the metrics of a step; a value that is not finite is written as null."""
        values = {name: float(value) for name, value in metrics.items()}
        row = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": int(step), **row}) + "\n")
        self._file.flush()
        self.skipped += row.get("train/skipped") or 0
        tracking.scalars(self._kind, step, values)

    def sync(self) -> None:
        """Returns once the steps so far are on the disk, as before a checkpoint that has them."""
        if processes.is_first():
            records.sync(self.path)
        tracking.flush()

    def close(self) -> None:
        """Closes the file; the writer is of no use afterwards."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, float | None]]:
    """The rows of a metrics file in order; a last line that a kill cut off is dropped."""
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    rows = []
    for number, line in enumerate(lines[:-1], start=1):  # a whole line ends in "\n"
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise InputError(f"{path}:{number} is not JSON ({error}); remove that line") from error
    return rows


def say(line: str) -> None:
    """One line for the person who watches, on stderr; plain text, never markup."""
    if processes.is_first():
        text = errors.printable(line)
        _stderr().print(text, markup=False, highlight=False, soft_wrap=True)


def warn(line: str) -> None:
    """As `say`, but of every process, which it names where there are several."""
    which = f"process {processes.index()}: " if processes.count() > 1 else ""
    text = errors.printable(f"warning: {which}{line}")
    _stderr().print(text, markup=False, highlight=False, soft_wrap=True)


def show(line: str) -> None:
    """One line of the result, on stdout."""
    if processes.is_first():
        print(line)


class Progress(Protocol):
    """What `progress` gives."""

    def advance(self, n: int = 1) -> None:
        """Counts n more items as done."""


@contextlib.contextmanager
def progress(total: int | None, description: str, start: int = 0) -> Iterator[Progress]:
    """Shows on stderr how many items are done: a live bar on a terminal, else a line every 10 s.

    total: None where it is not known. start: items that an earlier run had done.
    """
    with heartbeat.doing(description, total, start), _shown(total, description, start) as bar:
        yield bar


@contextlib.contextmanager
def _shown(total: int | None, description: str, start: int) -> Iterator[Progress]:
    screen = _stderr()
    if not screen.is_terminal or not processes.is_first():
        plain = _PlainProgress(total, description, start)
        yield plain
        plain.show()
        return
    columns = (
        rich_progress.TextColumn("{task.description}", markup=False),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TimeElapsedColumn(),
        rich_progress.TimeRemainingColumn(),
    )
    with rich_progress.Progress(*columns, console=screen) as live:
        yield _LiveProgress(live, live.add_task(description, total=total, completed=start))


class _LiveProgress:
    def __init__(self, live: rich_progress.Progress, task: rich_progress.TaskID):
        self._live, self._task = live, task

    def advance(self, n: int = 1) -> None:
        self._live.advance(self._task, n)
        done = round(self._live.tasks[0].completed)
        heartbeat.moved(str(done), done)


class _PlainProgress:
    def __init__(self, total: int | None, description: str, start: int):
        self._total, self._description = total, description
        self._done = start
        self._began = self._shown = time.monotonic()
        self._first: tuple[float, int] | None = None  # when the first item ended, and what was done

    def advance(self, n: int = 1) -> None:
        self._done += n
        self._first = self._first or (time.monotonic(), self._done)
        heartbeat.moved(self._count, self._done)
        is_last = self._done == self._total
        if not is_last and time.monotonic() - self._shown >= _PLAIN_INTERVAL_S:
            self.show()

    def show(self) -> None:
        self._shown = time.monotonic()
        said = f"{self._description}: {self._count} in {duration(self._shown - self._began)}"
        left = self._left()
        say(said if left is None else f"{said}, about {duration(left)} left")

    def _left(self) -> float | None:
        """Seconds, by the items after the first, which compiles; None before there is one."""
        if self._total is None or self._first is None:
            return None
        ended, first = self._first
        made, left = self._done - first, self._total - self._done
        return (self._shown - ended) * left / made if made > 0 and left > 0 else None

    @property
    def _count(self) -> str:
        return str(self._done) if self._total is None else f"{self._done}/{self._total}"


def duration(seconds: float) -> str:
    """Seconds for people: 12 s, 1 min 05 s, 2.5 h."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds:02d} s" if minutes < 60 else f"{minutes / 60:.1f} h"


def table(title: str, rows: Sequence[Mapping[str, object]]) -> None:
    """Prints a table on stdout, columns as in the first row; cells are plain text, never markup."""
    if not processes.is_first():
        return
    screen = console.Console()
    if not screen.is_terminal:
        screen.width = _PLAIN_WIDTH
    grid = rich_table.Table(title=text.Text(title), title_justify="left")
    for name in rows[0] if rows else ():
        numeric = all(isinstance(row[name], int | float) for row in rows)
        grid.add_column(text.Text(name), justify="right" if numeric else "left")
    for row in rows:
        grid.add_row(*(text.Text(_cell(row[name])) for name in rows[0]))
    screen.print(grid)


def _stderr() -> console.Console:
    return console.Console(stderr=True)


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else errors.printable(str(value))
