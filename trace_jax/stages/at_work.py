"""What stands around the stages of a run: its lock, its sign of life, where its metrics go."""

import contextlib
from collections.abc import Iterator

from trace_jax import heartbeat, locks, metrics, processes, tracking
from trace_jax.stages import context


@contextlib.contextmanager
def at_work(run: context.Context) -> Iterator[None]:
    """In here the run holds its workdir.

    Raises:
      InputError: another run holds it, or a sink of metrics cannot be opened.
    """
    directory, settings = run.workdir.path, run.config.tracking
    with (
        locks.of(directory),
        heartbeat.beating(
            directory,
            stuck_after=settings.stuck_after,
            process=processes.index(),
            processes=processes.count(),
            say=metrics.warn,
        ),
        tracking.to(settings, directory, run.flat_config),
    ):
        yield
